"""Which devices a run takes, and how they are arranged."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from ml_collections import FrozenConfigDict

from jaxlm.errors import ConfigError
from jaxlm.model import attention
from jaxlm.telemetry import flops
from jaxlm.training import memory
from jaxlm.training.parallel import AXES, LANES, REPLICAS


def mesh(cfg: FrozenConfigDict) -> Mesh:
    """The mesh of a config: devices in the order of their processes, `tensor` innermost.

    Raises:
      ConfigError: as `shape`; or one of several processes would have none of the devices.
    """
    sizes = shape(cfg, jax.device_count(), memory.limit())
    taken = jax.devices()[: math.prod(sizes.values())]
    if idle := set(range(jax.process_count())) - {device.process_index for device in taken}:
        asked = ", ".join(f"parallel.{name}={size}" for name, size in sizes.items())
        raise ConfigError(
            f"{asked} take {len(taken)} of {jax.device_count()} devices, none of process {', '.join(map(str, idle))}: "
            "set parallel.data=-1, which takes all, or start fewer processes"
        )
    return Mesh(np.array(taken).reshape(tuple(sizes.values())), AXES)


def imagined(cfg: FrozenConfigDict) -> AbstractMesh:
    """The mesh of a config where its devices need not be: as many as it asks for, or as there are."""
    section = cfg.parallel
    asked = max(section.data, 1) * max(section.fsdp, 1) * section.tensor
    sizes = shape(cfg, max(jax.device_count(), asked), memory.limit())
    return AbstractMesh(tuple(sizes.values()), AXES)


def shape(cfg: FrozenConfigDict, count: int, bytes_each: int | None) -> dict[str, int]:
    """How many devices of `count` a config's `parallel` section wants along each axis of the mesh.

    parallel.fsdp=0 becomes the least number, of those that divide the devices, with which a step is estimated to fit a
    device, or the largest where it fits on none; 1 where a device's memory is not known.

    Raises:
      ConfigError: more devices than there are, or a batch or a model that does not divide over them.
    """
    if cfg.parallel.fsdp:
        return _checked(cfg, count, cfg.parallel.fsdp)
    sizes: dict[str, int] = {}
    for fsdp in (n for n in range(1, count + 1) if count % n == 0):
        try:
            sizes = _checked(cfg, count, fsdp)
        except ConfigError:
            if fsdp == 1:
                raise
            continue
        needed = memory.estimate(cfg, AbstractMesh(tuple(sizes.values()), AXES))
        if bytes_each is None or sum(needed.values()) < bytes_each:
            break
    return sizes


def _checked(cfg: FrozenConfigDict, count: int, fsdp: int) -> dict[str, int]:
    section, model = cfg.parallel, cfg.model
    each = fsdp * section.tensor
    if section.data == -1 and count % each:
        raise ConfigError(
            f"parallel.data=-1 takes all devices, and JAX sees {count}, which parallel.fsdp times parallel.tensor, "
            f"here {each}, does not divide; change these, or give parallel.data"
        )
    data = count // each if section.data == -1 else section.data
    sizes = {"data": data, "fsdp": fsdp, "tensor": section.tensor}
    if data * each > count:
        asked = ", ".join(f"parallel.{name}={size}" for name, size in sizes.items())
        raise ConfigError(
            f"{asked} are {data * each} devices; JAX sees {count}, of which parallel.data=-1 takes all where "
            "parallel.fsdp times parallel.tensor divides them"
        )
    _check_rows(cfg, data * fsdp)
    widths: dict[str, dict[str, Any]] = {
        "tensor": {"num_heads": model.num_heads, "feed_forward_dim": model.feed_forward_dim or 4 * model.embed_dim},
        "fsdp": {"embed_dim": model.embed_dim},
    }
    for axis, wide in widths.items():
        for name, size in wide.items():
            if size % sizes[axis]:
                raise ConfigError(f"parallel.{axis}={sizes[axis]} does not divide model.{name}={size}")
    return sizes


def _check_rows(cfg: FrozenConfigDict, parts: int) -> None:
    data = cfg.data
    if data.batch_size % (parts * data.micro_batches):
        raise ConfigError(
            f"data.batch_size={data.batch_size} does not divide into {data.micro_batches} micro-batches over {parts} "
            "devices; change data.batch_size, data.micro_batches, parallel.data or parallel.fsdp"
        )


def replicas(cfg: FrozenConfigDict) -> Mesh:
    """The devices of pmap, along one axis.

    Raises:
      ConfigError: more than there are, parameters that are to be divided, or several processes.
    """
    section = cfg.parallel
    if section.fsdp > 1 or section.tensor > 1:
        raise ConfigError(
            f"parallel.mode='pmap' holds all parameters on each device; parallel.fsdp={section.fsdp} and "
            f"parallel.tensor={section.tensor} divide them: use parallel.mode='jit'"
        )
    if section.deterministic:
        raise ConfigError("parallel.deterministic=True is not told to jax.pmap's compiler: use parallel.mode='jit'")
    if jax.process_count() > 1:
        raise ConfigError(
            f"parallel.mode='pmap' is for one process, and there are {jax.process_count()}: use parallel.mode='jit'"
        )
    count = jax.device_count() if section.data == -1 else section.data
    if count > jax.device_count():
        raise ConfigError(f"parallel.data={count} are more devices than the {jax.device_count()} that JAX sees")
    _check_rows(cfg, count)
    return Mesh(np.array(jax.devices()[:count]), (REPLICAS,))


def of_lanes(lanes: int) -> Mesh:
    """The mesh of runs side by side: as many devices as divide them. A lane lies on one."""
    return Mesh(np.array(jax.devices()[: math.gcd(lanes, jax.device_count())]), (LANES,))


def remarks(cfg: FrozenConfigDict) -> list[str]:
    """What a config does otherwise on these devices than one may think, as lines to say.

    Raises:
      ConfigError: it wants what they don't have.
    """
    said, model, kind = [], cfg.model, jax.devices()[0].device_kind
    reason = attention.falls_back(model)
    if reason and model.attention == "cudnn":
        raise ConfigError(f"model.attention='cudnn' can't serve here: {reason}; set model.attention='auto'")
    if jax.default_backend() == "cpu":
        if model.remat != "none" and model.unroll:
            said.append(
                f"warning: model.remat={model.remat!r} saves no memory on a CPU with model.unroll=True: its compiler "
                "undoes it; set model.unroll=False"
            )
        return said
    if reason:
        said.append(f"attention is computed in blocks: {reason}")
    if jax.__version_info__ < (0, 11, 1):  # openxla/xla#46225
        said.append(
            f"warning: JAX {jax.__version__} computes the embedding's gradient slowly on GPUs; Python >= 3.12 has a "
            "JAX >= 0.11.1, which does not"
        )
    if flops.peak_flops(kind, model.dtype) is None:
        said.append(f"warning: no MFU: the peak of {kind!r} in {model.dtype} is not known")
    return said
