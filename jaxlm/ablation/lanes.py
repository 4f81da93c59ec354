"""Many runs as one program: which may share one, how many at once, and their training side by side.

Runs share a program where their configs differ in the seed and in traced numbers only. A lane is a run like any other:
its own directory, data order, metrics and checkpoints. The loop computes them all in one call; a lane that has ended is
computed on, and nobody looks at it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import re
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from jaxlm import config, data, functions
from jaxlm.errors import ConfigError
from jaxlm.evals.memory import exhausted
from jaxlm.telemetry import energy
from jaxlm.telemetry.progress import View
from jaxlm.training import loop, memory, step
from jaxlm.training.prepare import Prepared
from jaxlm.training.run import open_run
from jaxlm.training.signals import Signals
from jaxlm.training.steps import build

_TIMED = 3  # calls, after one that compiles
_MEASURED = 3.0  # seconds: counters of energy move every tenth of a second or so


class Member(NamedTuple):
    """A run that is to be trained beside others."""

    prepared: Prepared
    workdir: Path
    view: Callable[[int], contextlib.AbstractContextManager[View]]  # what shows it, from its completed steps


def shared(cfg: FrozenConfigDict) -> Hashable:
    """What two prepared configs must have alike to be lanes of one program: all but the seed and the traced numbers."""
    return _shared(config.resolve(config.override(cfg, {"seed": 0})), functions.digest(cfg))


@functools.lru_cache(maxsize=1024)
def _shared(cfg: FrozenConfigDict, code: str) -> Hashable:  # the code of what the config names
    structure, _ = step.split(cfg)
    traced = ("optimizer.", "loss.", "model.dropout")  # as far as they are no numbers, in the structure
    return structure, tuple((path, value) for path, value in config.items(cfg) if not path.startswith(traced))


def shape(cfg: FrozenConfigDict) -> Hashable:
    """What decides, but for the optimizer, how many lanes are fastest: the model, and the tokens of a call."""
    model = tuple((path, value) for path, value in config.items(cfg.model) if path != "dropout")
    return model, cfg.data.batch_size, cfg.data.micro_batches, cfg.steps_per_call, cfg.divergence.rollback_z > 0


def most(cfg: FrozenConfigDict) -> int:
    """How many lanes fit into the memory of all devices, by the estimate of `training.memory`; at least 1."""
    if cfg.divergence.rollback_z:
        return 1  # a run that goes back leaves its lane
    share = 0.9 if memory.limit() else 0.5  # of a device, beside what XLA takes; of a CPU's, which others use too
    return max(1, int(memory.room(share) * jax.local_device_count() // sum(memory.estimate(cfg).values())))


def even(runs: int, lanes: int) -> int:
    """The width at which so many runs take as few calls as with `lanes`, leave fewest lanes empty, and are divided
    among as many devices."""
    width, parts = -(-runs // -(-runs // lanes)), math.gcd(lanes, jax.device_count())
    return -(-width // parts) * parts


def choose(members: Sequence[Prepared], say: Callable[[str], None]) -> int:
    """How many of the runs to train at once: timed with 1, 2, 4, ... lanes, for as long as a step takes less per lane.

    It often takes more where a run alone keeps all of the device at work, as on a CPU; then this is 1. Of several
    devices all are used: more than one lane is as many as they are, or a multiple.
    """
    limit = min(most(members[0].config), len(members))
    if limit == 1:
        return 1
    count = jax.device_count()
    limit = -(-limit // count) * count
    best, width = seconds_per_step(members[:1], 0), 1
    while width < limit:
        wider = min(max(2 * width, count), limit)
        try:
            seconds = seconds_per_step(members[:wider], wider) / min(wider, len(members))
        except jax.errors.JaxRuntimeError as error:
            if not exhausted(error):
                raise
            say(f"{wider} lanes do not fit the memory")
            break
        say(f"a step takes {seconds * 1e3:.3g} ms a lane with {wider} lanes, {best * 1e3:.3g} with {width}")
        if seconds > best:
            break
        best, width = seconds, wider
    return width


def seconds_per_step(members: Sequence[Prepared], lanes: int) -> float:
    """Of the call that trains them all by a step, the fastest of a few. One member: alone, with `lanes` 0."""
    call, count = _stepping(members, lanes)
    return min(call() for _ in range(_TIMED)) / count


def median_seconds_per_step(one: Prepared) -> float:
    """Of a run alone: what a budget buys steps at, which the fastest call of a few would make too many."""
    call, count = _stepping([one], 0)
    return statistics.median(call() for _ in range(_TIMED)) / count


def joules_per_step(one: Prepared) -> float:
    """Of a step of a run alone, over some seconds, by what its `log.energy` names.

    Raises:
      ConfigError: nothing here measures it.
    """
    call, count = _stepping([one], 0)
    said: list[str] = []
    with energy.meter(one.config.log.energy, said.append) as meter:
        if meter is None:
            why = " ".join(said) or "log.energy='off'"
            raise ConfigError(f"a budget in joules can't be kept: {why}")
        calls, before, begin = 0, meter.read(), time.perf_counter()
        while time.perf_counter() - begin < _MEASURED:
            call()
            calls += 1
        return (meter.read() - before) / (calls * count)


def _stepping(members: Sequence[Prepared], lanes: int) -> tuple[Callable[[], float], int]:
    """A call, already compiled, that takes so many steps with each of the members and gives the seconds it took."""
    first = members[0].config
    steps = build(first, lanes)
    hparams = [step.split(one.config)[1] for one in members]
    states = steps.together([steps.init(one.config.seed, h, None) for one, h in zip(members, hparams)])
    batches, _ = data.training(first.data, members[0].data, first.model.context_length, first.seed)
    rows = batches[0]
    count = first.steps_per_call
    if count > 1:
        rows = {name: np.stack([x] * count) for name, x in rows.items()}
    batch = steps.batch([rows] * len(members))
    stacked = steps.stacked(hparams)

    def call() -> float:
        nonlocal states
        begin = time.perf_counter()
        states, metrics = steps.advance(stacked, states, batch, count)
        jax.block_until_ready(metrics)
        return time.perf_counter() - begin

    call()
    return call, count


def train(members: Sequence[Member], lanes: int, signals: Signals) -> None:
    """Trains runs of one program, at most `lanes` of them, to their ends; each goes on from its latest checkpoint.

    Once a signal is caught, runs may not be over. One that diverges says so in its status.

    Raises:
      ConfigError, DataError: as `loop.train`.
    """
    cfg = members[0].prepared.config
    with contextlib.ExitStack() as stack:
        stack.enter_context(memory.explained(cfg))
        steps = build(cfg, lanes if lanes > 1 else 0)
        runs = [stack.enter_context(open_run(one.prepared, one.workdir, steps, one.view)) for one in members]
        for done in sorted({run.done for run in runs}):  # a kill may have left them at different steps
            if not signals.caught:
                loop.go([run for run in runs if run.done == done], steps, signals)
        for run in runs:
            run.ended = run.ended or "preempted"


def digest(key: Hashable) -> str:
    """A name for what is `shared`, that other processes give it too."""
    return hashlib.sha256(re.sub(r" at 0x\w+", "", repr(key)).encode()).hexdigest()[:12]
