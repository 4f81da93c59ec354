"""Where arrays live and how the pure step is compiled. The step knows none of this."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxlm import tree
from jaxlm.model import gpt2

PyTree = Any
AnyMesh = Mesh | AbstractMesh
"""Also one whose devices are not here: enough to tell how arrays are divided."""

GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
"""XLA's compiler options: no trials of Triton's matrix products beside cuBLAS's, none of which was taken in GPT-2 124M
on an H200, and which cost time to compile (experiments/bench/README.md)."""


AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
"""The axes over which a batch's rows are divided."""
LANES, REPLICAS = "lanes", "replicas"
"""The axes of meshes of lanes and of pmap, whose arrays have a leading axis along which they are divided."""

SHARDINGS: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = (
    (r"wte/embedding$", (("tensor",), ("fsdp",))),  # [V, D]
    (r"wpe/embedding$", ((), ("fsdp",))),  # [T, D]
    (r"h/attn/c_attn/kernel$", ((), ("tensor", "fsdp"), ())),  # [L, D, 3D], whose 3D are no heads in a row
    (r"h/attn/c_proj/kernel$", ((), ("tensor",), ("fsdp",))),  # [L, D, D]
    (r"h/mlp/c_fc/kernel$", ((), ("fsdp",), ("tensor",))),  # [L, D, F]
    (r"h/mlp/c_fc/bias$", ((), ("tensor",))),  # [L, F]
    (r"h/mlp/c_proj/kernel$", ((), ("tensor",), ("fsdp",))),  # [L, F, D]
    (r"lm_head/kernel$", (("fsdp",), ("tensor",))),  # [D, V]
)
"""Along which axes of the mesh the dimensions of a parameter are divided, by a regex over its path; all else lies whole
on each device. Optimizer state, whose paths end in those of its parameters, lies as they do. No arrangement changes
what is computed: the compiler moves what a device lacks."""


def shardings(arrays: PyTree, mesh: AnyMesh) -> PyTree:
    """How parameters, or a state of them, lie over a mesh: a NamedSharding for each array, by `SHARDINGS`."""

    def sharding(key_path: tuple[Any, ...], x: Any) -> NamedSharding:
        path = tree.path_of(key_path)
        axes = next((axes for pattern, axes in SHARDINGS if re.search(pattern, path)), ())
        if len(axes) != x.ndim:  # optimizer state of another shape than its parameter
            return NamedSharding(mesh, PartitionSpec())
        parts = [math.prod(mesh.shape.get(axis, 1) for axis in over) for over in axes]
        fits = [over if n > 1 and size % n == 0 else None for n, over, size in zip(parts, axes, x.shape)]
        return NamedSharding(mesh, PartitionSpec(*fits))

    return jax.tree_util.tree_map_with_path(sharding, arrays)


ACTIVATIONS: dict[str, PartitionSpec] = {
    "embedded": PartitionSpec(ROWS),  # [B, T, D]
    "hidden": PartitionSpec(ROWS),  # [B, T, D]
    "heads": PartitionSpec(ROWS, None, "tensor"),  # [B, T, H, K]
    "feed_forward": PartitionSpec(ROWS, None, "tensor"),  # [B, T, F]
}
"""How the activations that `gpt2.build` names are divided: without these words the compiler may divide the residual
stream by its width, and gather batches where it is to gather one layer's parameters."""


def placing(mesh: Mesh) -> gpt2.Placement:
    """The `placement` of `gpt2.build` for a mesh."""
    if mesh.size == 1:
        return gpt2.ON_ONE_DEVICE

    def lie(x: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def brought(x: jax.Array, rest: PartitionSpec, use: PartitionSpec) -> jax.Array:
        """A parameter from where it rests to where it is wanted; its gradient is added up back where it rests."""

        def forth(_: tuple[()], x: jax.Array) -> jax.Array:
            return lie(lie(x, rest), use)

        def back(_: tuple[()], x: jax.Array) -> jax.Array:
            # divided by width at once, rows of the lookup's gradient cross over; with `tensor`, XLA gathers them all
            return lie(x if mesh.shape["tensor"] == 1 else lie(x, use), rest)

        out: jax.Array = jax.custom_derivatives.linear_call(forth, back, (), x)
        return out

    def array(name: str, x: jax.Array) -> jax.Array:
        if name in ACTIVATIONS:
            return lie(x, ACTIVATIONS[name])
        if name == "table":
            return brought(x, PartitionSpec("tensor", "fsdp"), PartitionSpec("tensor"))
        if mesh.shape["tensor"] == 1:
            return x
        return lie(lie(x, PartitionSpec("tensor")), PartitionSpec(None, None, "tensor"))  # the kernel

    if mesh.shape["tensor"] == 1:
        return gpt2.Placement(array)
    # The kernel lies divided by D. Each device takes its heads of it when they are wanted, and once more in the
    # backward pass: the product keeps none of it. The gradients of three would be added up over devices one by one.
    return gpt2.Placement(array, products=1, product=jax.checkpoint)


def bytes_per_device(arrays: PyTree, mesh: AnyMesh) -> int:
    """Of arrays that lie by `shardings`; shapes are enough."""
    parts = jax.tree.map(
        lambda x, lies: math.prod(lies.shard_shape(x.shape)) * x.dtype.itemsize, arrays, shardings(arrays, mesh)
    )
    return sum(jax.tree.leaves(parts))


def everywhere(mesh: Mesh) -> NamedSharding:
    """Whole on each device."""
    return NamedSharding(mesh, PartitionSpec())


def laid_out(mesh: Mesh) -> NamedSharding:
    """How what is no state of a run lies: whole on each device; of lanes or replicas, divided by the leading axis."""
    leading = [axis for axis in mesh.axis_names if axis in (LANES, REPLICAS)]
    return NamedSharding(mesh, PartitionSpec(*leading))


def rows_here(mesh: Mesh, size: int) -> slice:
    """The rows of a batch of that size which lie on this process's devices, and those between them."""
    lies = NamedSharding(mesh, PartitionSpec(ROWS)).addressable_devices_indices_map((size,))
    ranges = [index[0].indices(size) for index in lies.values() if index]
    return slice(min(start for start, _, _ in ranges), max(stop for _, stop, _ in ranges)) if ranges else slice(0, 0)


def put(
    batch: Mapping[str, np.ndarray], mesh: Mesh, *, shared: bool = False, first: int = 0, rows: int = 0
) -> dict[str, Any]:
    """A host batch on the devices; on one device as it is, for the call to take it there, in a fraction of the time.

    Arrays are [B, T] or [steps, B, T], and their rows are divided among the devices; of lanes or replicas [N, B, T] or
    [N, steps, B, T], and these are.

    Args:
      shared: [B, T] also where the mesh is one of lanes, for all of them.
      first: of the batch's rows, that of the arrays; other processes hold others.
      rows: of the batch; 0: as many as the arrays have.
    """
    if mesh.size == 1:
        return dict(batch)

    def place(x: np.ndarray) -> jax.Array:
        if mesh.axis_names != AXES:
            return jax.device_put(x, everywhere(mesh) if shared else laid_out(mesh))
        before = x.ndim - 2
        lies = NamedSharding(mesh, PartitionSpec(*[None] * before, ROWS))
        shape = (*x.shape[:before], rows or x.shape[before], x.shape[-1])

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[before].indices(shape[before])
            return x[(*index[:before], slice(start - first, stop - first))]

        return jax.device_put(x, lies) if lies.is_fully_addressable else jax.make_array_from_callback(shape, lies, part)

    return {name: place(x) for name, x in batch.items()}


def here(arrays: PyTree) -> PyTree:
    """Arrays that may be divided among processes, as arrays that each process has whole."""
    if jax.process_count() == 1:
        return arrays
    return multihost_utils.process_allgather(arrays, tiled=True)


def compile(
    fn: Callable[..., Any],
    mesh: Mesh,
    mode: str = "jit",
    *,
    in_axes: Any = 0,
    out_axes: Any = 0,
    donate: tuple[int, ...] = (),
    out: PyTree | None = None,
    deterministic: bool = False,
) -> Callable[..., Any]:
    """A pure function, compiled for the devices of a mesh.

    Args:
      mode: "jit"; "lanes", which is jit of its vmap over a leading axis of runs; "pmap", by `jax.pmap` over the mesh's
        one axis, `REPLICAS`.
      in_axes, out_axes: as of vmap and pmap.
      donate: positions of arguments whose buffers the results may take over.
      out: how the results lie; by default they are `laid_out`. pmap's lie along its axis.
      deterministic: the same bits from each call on GPUs, as `parallel.deterministic` of a config; not of pmap.
    """
    if mode not in ("jit", "lanes", "pmap"):
        raise ValueError(f"mode is {mode!r}; expected 'jit', 'lanes' or 'pmap'")
    if mode == "pmap":
        devices = list(mesh.devices.flat)
        return jax.pmap(fn, REPLICAS, in_axes=in_axes, out_axes=out_axes, devices=devices, donate_argnums=donate)
    if mode == "lanes":
        fn = jax.vmap(fn, in_axes, out_axes)
    options: dict[str, Any] | None = None
    if mesh.devices.flat[0].platform == "gpu":
        options = GPU_OPTIONS | {"xla_gpu_deterministic_ops": deterministic}
    return jax.jit(
        fn, donate_argnums=donate, out_shardings=laid_out(mesh) if out is None else out, compiler_options=options
    )


def repeat(train_step: Callable[..., tuple[PyTree, PyTree]]) -> Callable[..., tuple[PyTree, PyTree]]:
    """Several steps as one function: (hparams, state, batches) -> (state, metrics), batches and metrics with a
    leading axis of steps."""

    def steps(hparams: PyTree, state: PyTree, batches: PyTree) -> tuple[PyTree, PyTree]:
        return jax.lax.scan(lambda state, batch: train_step(hparams, state, batch), state, batches)

    return steps
