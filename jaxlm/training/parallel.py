"""Where arrays live and how the pure step is compiled. The step knows none of this."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.errors import ConfigError

PyTree = Any

GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
"""XLA's compiler options: no trials of Triton's matrix products beside cuBLAS's, none of which was taken in GPT-2 124M
on an H200, and which cost time to compile (experiments/bench/README.md)."""


def mesh(section: Any, batch_size: int, micro_batches: int) -> Mesh:
    """The mesh of a config's `parallel` section: one axis, "data", along which a batch's rows are laid out.

    Raises:
      ConfigError: more devices than there are, or a batch that does not divide over them.
    """
    devices = jax.devices()
    count = len(devices) if section.data == -1 else section.data
    if count > len(devices):
        raise ConfigError(f"parallel.data={count}, but JAX sees {len(devices)} devices")
    if batch_size % (count * micro_batches):
        raise ConfigError(
            f"data.batch_size={batch_size} does not divide into {micro_batches} micro-batches over {count} devices; "
            "change data.batch_size, data.micro_batches or parallel.data"
        )
    return Mesh(np.array(devices[:count]), ("data",))


def lane_mesh(lanes: int) -> Mesh:
    """The mesh of runs side by side: one axis, "lanes", over as many devices as divide them. A lane lies on one."""
    devices = jax.devices()
    return Mesh(np.array(devices[: math.gcd(lanes, len(devices))]), ("lanes",))


def laid_out(mesh: Mesh) -> NamedSharding:
    """How results lie: whole on each device of a run; divided along the leading axis where that is one of lanes."""
    return NamedSharding(mesh, PartitionSpec("lanes") if mesh.axis_names == ("lanes",) else PartitionSpec())


def put(batch: Mapping[str, np.ndarray], mesh: Mesh, *, shared: bool = False) -> dict[str, jax.Array]:
    """A host batch on the devices. Arrays are [B, T] or [steps, B, T], and their rows are divided among the devices; of
    lanes [N, B, T] or [N, steps, B, T], and the lanes are.

    Args:
      shared: [B, T] also where the mesh is one of lanes, for all of them.
    """

    def place(x: np.ndarray) -> jax.Array:
        rows = PartitionSpec(*[None] * (x.ndim - 2), "data")
        of_lanes = PartitionSpec(None if shared else "lanes")
        return jax.device_put(x, NamedSharding(mesh, rows if mesh.axis_names == ("data",) else of_lanes))

    return {name: place(x) for name, x in batch.items()}


def compile(fn: Callable[..., Any], mesh: Mesh, *, donate: tuple[int, ...] = ()) -> Callable[..., Any]:
    """jit of a pure function over a mesh; results are `laid_out`.

    Args:
      donate: positions of arguments whose buffers the results may take over.
    """
    options = GPU_OPTIONS if mesh.devices.flat[0].platform == "gpu" else None
    return jax.jit(fn, donate_argnums=donate, out_shardings=laid_out(mesh), compiler_options=options)


def repeat(train_step: Callable[..., tuple[PyTree, PyTree]]) -> Callable[..., tuple[PyTree, PyTree]]:
    """Several steps as one function: (hparams, state, batches) -> (state, metrics), batches and metrics with a
    leading axis of steps."""

    def steps(hparams: PyTree, state: PyTree, batches: PyTree) -> tuple[PyTree, PyTree]:
        return jax.lax.scan(lambda state, batch: train_step(hparams, state, batch), state, batches)

    return steps
