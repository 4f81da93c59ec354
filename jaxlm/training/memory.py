"""What a step takes of a device's memory, and what to change where that is too much."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh
from ml_collections import FrozenConfigDict

from jaxlm.errors import ConfigError
from jaxlm.evals.memory import exhausted
from jaxlm.model import attention
from jaxlm.training import parallel, step
from jaxlm.training.parallel import AnyMesh

ONE = AbstractMesh((1, 1, 1), parallel.AXES)
"""A device alone."""


def estimate(cfg: FrozenConfigDict, mesh: AnyMesh = ONE, here: bool = True) -> dict[str, int]:
    """Bytes on each device of a mesh, by what they are for. Parameters, optimizer and gradients are exact; the
    rest is a rule of thumb.

    Activations, in numbers per token of a layer with width D and H heads: 30 D while the layer is at work, and kept
    until its turn comes: 22 D without remat, 9 D with "dots", D with "block". Attention in blocks has besides 1.5 H T
    in float32 while it is at work, and without remat until its turn comes. So it is, roughly, in what XLA says of
    steps compiled for the CPU in float32 (JAX 0.10.2, D 256 and 768, T 256 and 1024); for an H200 in bfloat16 (JAX
    0.11.2) it says 28 D without remat, and 16 D of unrolled layers. Logits and their gradient are there together.

    Args:
      here: with the attention of this machine's devices; False: with that of a GPU that has cuDNN's.
    """
    state = step.shapes(cfg)
    model, T = cfg.model, cfg.model.context_length
    cut = mesh.shape.get("tensor", 1)
    tokens = cfg.data.batch_size // cfg.data.micro_batches // (mesh.size // cut) * T
    vocabulary = state.params["wte"]["embedding"].shape[0]
    D, itemsize = model.embed_dim, jax.numpy.dtype(model.dtype).itemsize
    blocks = bool(attention.falls_back(model, here))
    scores = blocks * 1.5 * model.num_heads * T * np.dtype(np.float32).itemsize
    kept = {"none": 22 * D * itemsize + scores, "dots": 9 * D * itemsize, "block": D * itemsize}[model.remat]
    at_work = 30 * D * itemsize + scores
    logits = (itemsize if model.loss_chunks else np.dtype(np.float32).itemsize) / max(1, model.loss_chunks)
    params = parallel.bytes_per_device(state.params, mesh)
    return {
        "parameters": params,
        "optimizer": parallel.bytes_per_device(state.opt_state, mesh),
        "gradients": params,
        "activations": int(tokens * (model.num_layers * kept + at_work)),
        "logits": int(2 * tokens * vocabulary // cut * logits),
    }


def of(compiled: Any) -> int:
    """Bytes on each device of a compiled step: what it takes in and gives out, and its temporary buffers."""
    found = compiled.memory_analysis()
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return int(kept + found.temp_size_in_bytes)


def available() -> int:
    """Bytes of this machine's memory that are free for use, where its kernel tells; else all of it."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def limit() -> int | None:
    """Bytes that JAX may take of a device; None where it does not say, as of a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("bytes_limit") if stats else None


def room(share: float) -> float:
    """Bytes that so large a share of a device's memory is; of a CPU's, of what is free now."""
    return share * (limit() or available() / jax.local_device_count())


def shown(parts: dict[str, int]) -> str:
    """The parts of `estimate` for people."""
    return ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in parts.items())


@contextlib.contextmanager
def explained(cfg: FrozenConfigDict, mesh: AnyMesh = ONE) -> Iterator[None]:
    """Turns a lack of memory, of a device or of this machine, into an error that says what to change.

    Raises:
      ConfigError: in its place.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and not exhausted(error):
            raise
        said = (str(error).splitlines() or ["no memory is left"])[0].rstrip(".")
        parts = estimate(cfg, mesh)
        raise ConfigError(
            f"out of memory: {said}. A step takes about {sum(parts.values()) / 1e9:,.1f} GB "
            f"({shown(parts)}). Raise data.micro_batches={cfg.data.micro_batches}, set model.remat='block' "
            f"(it is {cfg.model.remat!r}), raise parallel.fsdp where devices are many, or lower data.batch_size or "
            "model.context_length"
        ) from error
