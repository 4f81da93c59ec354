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
from jaxlm.training import parallel, step
from jaxlm.training.parallel import AnyMesh

ONE = AbstractMesh((1, 1, 1), parallel.AXES)
"""A device alone."""


def estimate(cfg: FrozenConfigDict, mesh: AnyMesh = ONE) -> dict[str, int]:
    """Bytes on each device of a mesh, by what they are for. Parameters, optimizer and gradients are exact; the
    rest is a rule of thumb.

    Activations, in numbers per token of a layer with width D and H heads: 37 D + 1.5 H T while the layer is at work,
    and kept until its turn comes: the same without remat, 9 D with "dots", D with "block". So it is in what XLA says of
    float32 steps compiled for the CPU (JAX 0.10.2, blockwise attention, D 768, T 256 and 1024); another compiler may
    need less. Logits are float32, twice.
    """
    structure, hparams = step.split(cfg)
    state = jax.eval_shape(step.build(structure).init, jax.random.key(0), hparams)
    model, T = cfg.model, cfg.model.context_length
    tokens = cfg.data.batch_size // cfg.data.micro_batches // mesh.shape["data"] // mesh.shape["fsdp"] * T
    vocabulary = state.params["wte"]["embedding"].shape[0]
    layer = 37 * model.embed_dim + 1.5 * model.num_heads * T
    kept = {"none": layer, "dots": 9 * model.embed_dim, "block": model.embed_dim}[model.remat]
    params = parallel.bytes_per_device(state.params, mesh)
    return {
        "parameters": params,
        "optimizer": parallel.bytes_per_device(state.opt_state, mesh),
        "gradients": params,
        "activations": int(tokens * (model.num_layers * kept + layer) * jax.numpy.dtype(model.dtype).itemsize),
        "logits": 2 * tokens * vocabulary // mesh.shape["tensor"] * np.dtype(np.float32).itemsize,
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


def shown(parts: dict[str, int]) -> str:
    """The parts of `estimate` for people."""
    return ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in parts.items())


@contextlib.contextmanager
def explained(cfg: FrozenConfigDict, mesh: AnyMesh = ONE) -> Iterator[None]:
    """Turns a device's lack of memory into an error that says what to change.

    Raises:
      ConfigError: in its place.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        parts = estimate(cfg, mesh)
        raise ConfigError(
            f"out of memory: {str(error).splitlines()[0]} A step takes about {sum(parts.values()) / 1e9:,.1f} GB "
            f"({shown(parts)}). Raise data.micro_batches={cfg.data.micro_batches}, set model.remat='block' "
            f"(it is {cfg.model.remat!r}), raise parallel.fsdp where devices are many, or lower data.batch_size or "
            "model.context_length"
        ) from error
