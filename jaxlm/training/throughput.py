"""How a step is computed the fastest on these devices: micro-batches, remat, the loop over layers, the loss in parts,
attention. None of them changes what is computed, the batch least of all."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm import config, data, files
from jaxlm.errors import ConfigError
from jaxlm.evals.memory import exhausted
from jaxlm.telemetry import flops
from jaxlm.telemetry.text import aligned
from jaxlm.training import devices, memory, processes, step
from jaxlm.training.prepare import prepare
from jaxlm.training.step import State
from jaxlm.training.steps import Alone

FIELDS = ("data.micro_batches", "model.remat", "model.unroll", "model.loss_chunks", "model.attention")
"""What is varied, in this order."""

_SPARE = 0.95  # of a device's memory, that a step may take: some of it is lost between buffers
_TIMED, _SECONDS = 3, 2.0  # calls at least, and seconds at most beyond them
_BETTER = 0.98  # of the best time, or less: what is nearer may be chance


class Tried(NamedTuple):
    """A way of computing a step."""

    values: tuple[Any, ...]  # of FIELDS
    bytes: int | None  # on each device; None where it was not compiled
    compile: float | None  # seconds
    seconds: float | None  # a step; None where it was not run
    why: str  # it was not run


class Found(NamedTuple):
    """What a search found; the first of `tried` is the config's own way."""

    best: Tried  # not run, where time ran out before one that fits was tried
    tried: list[Tried]
    tokens: int  # of a step
    mfu: float | None  # of the best
    left: bool  # whether time ran out before all was tried
    cached: bool

    def overrides(self) -> dict[str, Any]:
        """What to change in the config."""
        own = self.tried[0].values
        return {name: new for name, new, old in zip(FIELDS, self.best.values, own) if new != old}


def search(
    cfg: ConfigDict | FrozenConfigDict, *, seconds: float = 600, again: bool = False, say: Callable[[str], None] = print
) -> Found:
    """Compiles ways of computing a step ahead of time, leaves those that memory can't hold, and times the others.

    From the config's own way each field is changed in turn, the others at the best so far, until no change is faster.
    What was found is kept in the cache directory, by device and program.

    Args:
      seconds: no other way is begun after that.
      again: also where it was found before.
      say: takes a line as a way has been tried.

    Raises:
      ConfigError: the config is wrong, `parallel.mode` is not "jit", or no way at all fits the memory.
      DataError: as `jaxlm.train`.
    """
    if not seconds > 0:
        raise ConfigError(f"--seconds={seconds:g}; expected more than 0")
    cfg, opened, _ = prepare(cfg)
    if cfg.parallel.mode != "jit" or processes.count() > 1:
        raise ConfigError("throughput is tuned in one process with parallel.mode='jit'")
    kept = files.cache_dir(cfg.data.cache_dir) / "throughput" / f"{_key(cfg)}.json"
    if not again and (known := _read(kept)):
        return known
    batches, _ = data.training(cfg.data, opened, cfg.model.context_length, cfg.seed)
    timer = _Timer(cfg, batches[0])
    found = _climb(cfg, timer, time.monotonic() + seconds, say)
    try:
        if not found.left:
            _write(kept, found)
    except OSError as error:
        say(f"warning: what was found can't be kept in {kept.parent}: {error.strerror}")
    return found


def _climb(cfg: FrozenConfigDict, timer: Callable[[tuple[Any, ...]], Tried], deadline: float, say: Any) -> Found:
    tried: dict[tuple[Any, ...], Tried] = {}

    def rank(values: tuple[Any, ...]) -> tuple[float, float]:
        """Seconds; where it was not run, memory."""
        if values not in tried:
            tried[values] = timer(values)
            say(line(tried[values]))
        one = tried[values]
        return (math.inf, one.bytes or math.inf) if one.seconds is None else (one.seconds, 0)

    mesh = devices.mesh(cfg)
    rows = cfg.data.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    parts = [n for n in range(1, rows + 1) if rows % n == 0]
    best = tuple(config.flat(cfg)[name] for name in FIELDS)
    rank(best)
    left, improved = False, True
    while improved:
        improved = False
        for i in range(len(FIELDS)):
            for value in _others(cfg, parts, best, i):
                if left := time.monotonic() > deadline:
                    break
                new = (*best[:i], value, *best[i + 1 :])
                smaller = parts[parts.index(new[0]) + 1 :]
                while rank(new)[0] == math.inf and i and smaller:  # less of the batch at a time makes room for it
                    new = (smaller.pop(0), *new[1:])
                seconds, needs = rank(best)
                if rank(new) < (seconds * _BETTER, needs):
                    best, improved = new, True
    if tried[best].seconds is None and not left:
        raise ConfigError(
            f"no way to compute a step fits a device: the least that was found takes {tried[best].bytes or 0:,} bytes, "
            f"{tried[best].why}; lower data.batch_size or model.context_length, or raise parallel.fsdp"
        )
    tokens = cfg.data.batch_size * cfg.model.context_length
    return Found(tried[best], list(tried.values()), tokens, _mfu(cfg, tokens, tried[best]), left, cached=False)


def _others(cfg: FrozenConfigDict, parts: list[int], best: tuple[Any, ...], i: int) -> Iterator[Any]:
    """The values of a field worth a try beside the best one; `parts` are the micro-batches that there may be."""
    name, own = FIELDS[i], best[i]
    values: dict[str, list[Any]] = {
        "data.micro_batches": parts,
        "model.remat": ["none", "dots", "block"],
        "model.unroll": [True, False],
        "model.loss_chunks": [n for n in (0, 1, 2, 4, 8) if not n or cfg.model.context_length % n == 0],
        "model.attention": ["auto", "blockwise"] if jax.default_backend() == "gpu" else [own],
    }
    if name == "data.micro_batches":  # those beside it: what lies further off is tried when these are better
        at = values[name].index(own)
        yield from values[name][max(at - 1, 0) : at] + values[name][at + 1 : at + 2]
    else:
        yield from (value for value in values[name] if value != own)


class _Timer:
    """Gives how long a step takes: a call with values of FIELDS."""

    def __init__(self, cfg: FrozenConfigDict, batch: Any):
        self._cfg, self._batch = cfg, batch
        self._room = memory.room(_SPARE)
        self._state: State | None = None

    def __call__(self, values: tuple[Any, ...]) -> Tried:
        try:
            return self._tried(values)
        except jax.errors.JaxRuntimeError as error:
            if not exhausted(error):
                raise
            self._state = None  # it may be given up, half of it
            return Tried(values, None, None, None, "out of memory")

    def _tried(self, values: tuple[Any, ...]) -> Tried:
        cfg = config.resolve(config.override(self._cfg, dict(zip(FIELDS, values))))
        steps, hparams = Alone(cfg), step.split(cfg)[1]
        begin = time.perf_counter()
        compiled = steps.lower(like=self._batch).compile()
        seconds = time.perf_counter() - begin
        needs = memory.of(compiled)
        if needs > self._room:
            return Tried(values, needs, seconds, None, f"more than {self._room / 1e9:,.1f} GB")
        state = steps.init(cfg.seed, hparams, None) if self._state is None else self._state
        batch = steps.batch([self._batch])
        times: list[float] = []
        end = time.perf_counter() + _SECONDS
        while len(times) < 1 + _TIMED or time.perf_counter() < end:
            begin, self._state = time.perf_counter(), None
            state, metrics = compiled(hparams, state, batch)
            jax.block_until_ready(metrics)
            self._state = state
            times.append(time.perf_counter() - begin)
        return Tried(values, needs, seconds, statistics.median(times[1:]), "")


def _mfu(cfg: FrozenConfigDict, tokens: int, best: Tried) -> float | None:
    if best.seconds is None:
        return None
    each, mesh = flops.of_model(cfg.model, step.shapes(cfg).params), devices.mesh(cfg)
    kind = mesh.devices.flat[0].device_kind
    return flops.mfu(tokens / best.seconds, each, kind, cfg.model.dtype, mesh.size)


def _key(cfg: FrozenConfigDict) -> str:
    """Of the program, less what is varied, and where it runs."""
    structure = config.flat(step.split(cfg)[0].to_dict())
    named = {name: value for name, value in structure.items() if f"model.{name.rpartition('.')[2]}" not in FIELDS}
    here = [jax.devices()[0].device_kind, memory.limit(), dict(devices.mesh(cfg).shape), processes.versions()]
    here += [cfg.data.batch_size, cfg.data.pack, cfg.parallel.deterministic]
    own = [config.flat(cfg)[name] for name in FIELDS]
    return hashlib.sha256(json.dumps([named, here, own], default=str, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path) -> Found | None:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        tried = [Tried(tuple(values), *rest) for values, *rest in raw["tried"]]
        return Found(tried[raw["best"]], tried, raw["tokens"], raw["mfu"], raw["left"], cached=True)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None  # not there, or damaged: found anew


def _write(path: Path, found: Found) -> None:
    raw = found._asdict() | {"best": found.tried.index(found.best)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic(path) as file:
        file.write(json.dumps(raw).encode())


def line(tried: Tried) -> str:
    """A way that was tried, for one who waits."""
    shown = ", ".join(f"{name}={value}" for name, value in zip(FIELDS, tried.values))
    return f"{shown}: {tried.why or f'{(tried.seconds or 0) * 1e3:,.1f} ms'}"


def flags(found: Found) -> str:
    """What to change, for a command line."""
    return " ".join(f"--config.{name}={value}" for name, value in found.overrides().items())


def describe(found: Found) -> str:
    """The ways as a table, the fastest first, and what to set."""
    rows = [(*(name.rpartition(".")[2] for name in FIELDS), "GB", "compile (s)", "step (ms)", "tokens/s")]
    for one in sorted(found.tried, key=lambda one: one.seconds or math.inf):
        needs = "" if one.bytes is None else f"{one.bytes / 1e9:,.2f}"
        compiled = "" if one.compile is None else f"{one.compile:,.1f}"
        timed = (f"{one.seconds * 1e3:,.1f}", f"{found.tokens / one.seconds:,.0f}") if one.seconds else (one.why, "")
        rows.append((*map(str, one.values), needs, compiled, *timed))
    lines = aligned(rows, right={0, 3, 5, 6, 7, 8})
    own, best = found.tried[0].seconds, found.best.seconds
    change = flags(found)
    if best is None:
        lines.append("none of these fits")
    elif not change:
        lines.append("the config's own way is the fastest")
    else:
        lines.append(f"{own / best:.2f} times as fast as the config: {change}" if own else f"what fits: {change}")
    if found.mfu is not None:
        lines.append(f"MFU {found.mfu:.1%}")
    if found.left:
        lines.append("warning: time ran out before all was tried: give more --seconds")
    if found.cached:
        lines.append("found before, on this device with these versions; --again searches anew")
    return "\n".join(lines)
