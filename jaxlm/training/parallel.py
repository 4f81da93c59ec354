"""Where arrays live and how the pure step is compiled. The step knows none of this."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm import tree
from jaxlm.errors import ConfigError

PyTree = Any

GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
"""XLA's compiler options: no trials of Triton's matrix products beside cuBLAS's, none of which was taken in GPT-2 124M
on an H200, and which cost time to compile (experiments/bench/README.md)."""


AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
"""The axes over which a batch's rows are divided."""

SHARDINGS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"wte/embedding$", ("tensor", "fsdp")),  # [V, D]
    (r"wpe/embedding$", (None, "fsdp")),  # [T, D]
    (r"h/attn/c_attn/kernel$", (None, "fsdp", "tensor")),  # [L, D, 3D]
    (r"h/attn/c_attn/bias$", (None, "tensor")),
    (r"h/attn/c_proj/kernel$", (None, "tensor", "fsdp")),  # [L, D, D]
    (r"h/mlp/c_fc/kernel$", (None, "fsdp", "tensor")),  # [L, D, F]
    (r"h/mlp/c_fc/bias$", (None, "tensor")),
    (r"h/mlp/c_proj/kernel$", (None, "tensor", "fsdp")),  # [L, F, D]
    (r"lm_head/kernel$", ("fsdp", "tensor")),  # [D, V]
)
"""Along which axis of the mesh the dimensions of a parameter are divided, by a regex over its path; all else lies whole
on each device. Optimizer state, whose paths end in those of its parameters, lies as they do. No arrangement changes
what is computed: the compiler moves what a device lacks."""


def mesh(section: Any, model: Any, batch_size: int, micro_batches: int) -> Mesh:
    """The mesh of a config's `parallel` section, for a batch and the `model` section.

    Raises:
      ConfigError: more devices than there are, or a batch or a model that does not divide over them.
    """
    devices = jax.devices()
    each = section.fsdp * section.tensor
    count = len(devices) // each if section.data == -1 else section.data
    shape = {"data": count, "fsdp": section.fsdp, "tensor": section.tensor}
    asked = ", ".join(f"parallel.{name}={size}" for name, size in shape.items())
    if not 0 < count * each <= len(devices) or (section.data == -1 and len(devices) % each):
        raise ConfigError(
            f"{asked} are {count * each or each} devices; JAX sees {len(devices)}, of which parallel.data=-1 takes all "
            "where parallel.fsdp times parallel.tensor divides them"
        )
    rows = count * section.fsdp
    if batch_size % (rows * micro_batches):
        raise ConfigError(
            f"data.batch_size={batch_size} does not divide into {micro_batches} micro-batches over {rows} devices; "
            "change data.batch_size, data.micro_batches, parallel.data or parallel.fsdp"
        )
    widths = {
        "tensor": {"num_heads": model.num_heads, "feed_forward_dim": model.feed_forward_dim or 4 * model.embed_dim},
        "fsdp": {"embed_dim": model.embed_dim},
    }
    for axis, sizes in widths.items():
        for name, size in sizes.items():
            if size % shape[axis]:
                raise ConfigError(f"parallel.{axis}={shape[axis]} does not divide model.{name}={size}")
    return Mesh(np.array(devices[: count * each]).reshape(tuple(shape.values())), AXES)


def shardings(arrays: PyTree, mesh: Mesh) -> PyTree:
    """How parameters, or a state of them, lie over a mesh: a NamedSharding for each array, by `SHARDINGS`."""

    def sharding(key_path: tuple[Any, ...], x: Any) -> NamedSharding:
        path = tree.path_of(key_path)
        axes = next((axes for pattern, axes in SHARDINGS if re.search(pattern, path)), ())
        if len(axes) != x.ndim:  # optimizer state of another shape than its parameter
            return NamedSharding(mesh, PartitionSpec())
        fits = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, x.shape)]
        return NamedSharding(mesh, PartitionSpec(*fits))

    return jax.tree_util.tree_map_with_path(sharding, arrays)


def bytes_per_device(arrays: PyTree, mesh: Mesh) -> int:
    """Of arrays that lie by `shardings`; shapes are enough."""
    parts = jax.tree.map(
        lambda x, lies: math.prod(lies.shard_shape(x.shape)) * x.dtype.itemsize, arrays, shardings(arrays, mesh)
    )
    return sum(jax.tree.leaves(parts))


def lane_mesh(lanes: int) -> Mesh:
    """The mesh of runs side by side: one axis, "lanes", over as many devices as divide them. A lane lies on one."""
    devices = jax.devices()
    return Mesh(np.array(devices[: math.gcd(lanes, len(devices))]), ("lanes",))


def laid_out(mesh: Mesh) -> NamedSharding:
    """How what is no state lies: whole on each device of a run; of lanes, divided along the leading axis."""
    return NamedSharding(mesh, PartitionSpec("lanes") if mesh.axis_names == ("lanes",) else PartitionSpec())


def put(batch: Mapping[str, np.ndarray], mesh: Mesh, *, shared: bool = False) -> dict[str, jax.Array]:
    """A host batch on the devices. Arrays are [B, T] or [steps, B, T], and their rows are divided among the devices; of
    lanes [N, B, T] or [N, steps, B, T], and the lanes are.

    Args:
      shared: [B, T] also where the mesh is one of lanes, for all of them.
    """

    def place(x: np.ndarray) -> jax.Array:
        rows = PartitionSpec(*[None] * (x.ndim - 2), ROWS)
        of_lanes = PartitionSpec(None if shared else "lanes")
        return jax.device_put(x, NamedSharding(mesh, rows if mesh.axis_names == AXES else of_lanes))

    return {name: place(x) for name, x in batch.items()}


def compile(
    fn: Callable[..., Any], mesh: Mesh, *, donate: tuple[int, ...] = (), out: PyTree | None = None
) -> Callable[..., Any]:
    """jit of a pure function over a mesh.

    Args:
      donate: positions of arguments whose buffers the results may take over.
      out: how the results lie; by default they are `laid_out`.
    """
    options = GPU_OPTIONS if mesh.devices.flat[0].platform == "gpu" else None
    return jax.jit(fn, donate_argnums=donate, out_shardings=out or laid_out(mesh), compiler_options=options)


def repeat(train_step: Callable[..., tuple[PyTree, PyTree]]) -> Callable[..., tuple[PyTree, PyTree]]:
    """Several steps as one function: (hparams, state, batches) -> (state, metrics), batches and metrics with a
    leading axis of steps."""

    def steps(hparams: PyTree, state: PyTree, batches: PyTree) -> tuple[PyTree, PyTree]:
        return jax.lax.scan(lambda state, batch: train_step(hparams, state, batch), state, batches)

    return steps
