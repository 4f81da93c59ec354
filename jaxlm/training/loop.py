"""The one impure loop: data in; steps, metrics and checkpoints out. For a run alone, or for several side by side."""

from __future__ import annotations

import contextlib
import functools
import itertools
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm import data, files
from jaxlm.data.batches import Batch
from jaxlm.errors import PREEMPTED
from jaxlm.telemetry import curves, energy
from jaxlm.telemetry.profile import Profile
from jaxlm.telemetry.progress import Progress, Silent, View
from jaxlm.training import memory, position, processes
from jaxlm.training.prepare import prepare
from jaxlm.training.recorder import Spike
from jaxlm.training.run import Run, open_run
from jaxlm.training.signals import Signals
from jaxlm.training.step import State
from jaxlm.training.steps import Steps, build

_AHEAD = 2**16  # tokens of batches made in one go


class Result(NamedTuple):
    status: str  # "done", "stopped early" or "preempted"
    exit_code: int  # 0, 0 or 75
    state: State
    metrics: dict[str, float]  # of the last evaluation; empty where there was none
    workdir: Path


def train(
    cfg: ConfigDict | FrozenConfigDict, workdir: str | Path, *, seen: Callable[[int, Batch], None] | None = None
) -> Result:
    """Trains as the config says, in a run directory; goes on from its latest checkpoint if there is one.

    Args:
      cfg: complete, from `jaxlm.config.default()` or a file of `configs/`.
      workdir: the run directory.
      seen: is called with the rows that this process trains on, [N, T] each, and the number of the first of them among
        the run's sequences, from a thread that makes them ahead of their step.

    Returns:
      the final state, with early stopping the best one, and the metrics of the last evaluation. Where `exit_code` is
      75 (SIGTERM), the run goes on when called again.

    Raises:
      ConfigError: the config is wrong, or another run lives in `workdir`.
      DataError: data is missing or broken, or the run directory can't be written.
      DivergedError: the loss became non-finite; the checkpoints from before are kept.
      KeyboardInterrupt: SIGINT; of a run that was being stepped all is saved, and it goes on when called again.
    """
    workdir = files.expanded(workdir)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals())
        prepared = prepare(cfg, workdir)
        cfg = prepared.config
        steps = build(cfg)
        stack.enter_context(memory.explained(cfg, steps.mesh))

        def view(done: int) -> contextlib.AbstractContextManager[View]:
            if not processes.first():
                return contextlib.nullcontext(Silent())
            return Progress(prepared.config.steps, done, prepared.config.log.progress, every=prepared.config.log.every)

        run = stack.enter_context(open_run(prepared, workdir, steps, view, seen))
        go([run], steps, signals)
        if run.error:
            raise run.error
        run.return_to_best()
        if processes.first() and (curve := curves.draw(workdir)):
            run.say(f"loss curve: {curve}")
        if signals.caught == signal.SIGINT:  # who trains in a loop wants that to end, too
            raise KeyboardInterrupt
        assert run.state is not None
        exit_code = PREEMPTED if run.ended == "preempted" else 0
        return Result(run.ended, exit_code, run.state, run.metrics, workdir)


def go(runs: Sequence[Run], steps: Steps, signals: Signals) -> None:
    """Trains runs to their ends, or to the first reason to stop, which each then knows.

    Args:
      runs: of the structure of `steps`, at the same step, and at most as many as it has lanes.

    Raises:
      DataError: data broke, or a run directory can't be written.
    """
    with energy.meter(runs[0].cfg.log.energy, runs[0].say) as own:
        meter = processes.summed(own)
        while any(not run.ended for run in runs):
            try:
                _go(runs, steps, signals, meter)
            except Spike as spike:  # of a run alone: lanes could not part
                runs[0].roll_back(spike)


def _go(runs: Sequence[Run], steps: Steps, signals: Signals, meter: energy.Meter | None) -> None:
    device = jax.devices()[0].device_kind
    where = f"{steps.mesh.size} x {device}" + (f", beside {len(runs) - 1} others" if len(runs) > 1 else "")
    going = len(runs)
    states = steps.together([run.begin(where, meter, steps.mesh.size, lambda: going) for run in runs])
    hparams = steps.stacked([run.hparams for run in runs])
    first, cfg = runs[0], runs[0].cfg
    compiled: set[int] = set()

    at_once = _AHEAD // (cfg.data.batch_size * cfg.model.context_length * len(runs))
    parts = position.together(position.calls(first.done, cfg), at_once)

    def batches(part: list[tuple[int, int]]) -> list[tuple[tuple[int, int], Any]]:
        """Beside the calls of a part, made in one go: a thread that wakes for each one holds up small steps."""
        begin, end = part[0][0], sum(part[-1])
        made = [run.batch(begin, end - begin, steps.rows) for run in runs]

        def of(start: int, count: int) -> Any:
            where: Any = start - begin if count == 1 else slice(start - begin, start - begin + count)
            return steps.batch([{name: x[where] for name, x in batch.items()} for batch in made])

        return [(call, of(*call)) for call in part]

    def pause() -> None:
        for run in runs:
            if not run.ended:
                run.pause()

    signals.stepping = True
    profiled = cfg.log.profile if len(runs) == 1 and processes.first() else 0
    with (
        data.prefetch(batches, parts) as ahead,
        contextlib.closing(Profile(profiled, first.workdir / "profile", first.say)) as profile,
    ):
        for (start, count), rows in itertools.chain.from_iterable(ahead):
            if count not in compiled:  # what that takes is no step's time
                pause()
            if all(run.ended for run in runs):
                break
            begin = time.perf_counter()
            going = sum(not run.ended for run in runs)
            profile.before_call()
            states, metrics = steps.advance(hparams, states, rows, count)
            profile.after_call(count, metrics)
            if count not in compiled:
                compiled.add(count)
                first.say(f"compiled the step in {time.perf_counter() - begin:.1f} s")
            fetched = _Once(steps.fetch, metrics)
            sums = _Once(steps.evaluate, states, first.validation)
            heard = signals.heard()
            for i, run in enumerate(runs):
                if not run.ended:
                    run.take(start, count, functools.partial(fetched.part, steps, i))
            caught = signals.caught if heard else None
            if any(run.due(caught) for run in runs if not run.ended):  # of none, what others do is a step's time
                pause()
            for i, run in enumerate(runs):
                if not run.ended:
                    evaluate, state = functools.partial(sums.part, steps, i), functools.partial(steps.one, states, i)
                    run.between_steps(evaluate, state, caught)
            for run in (run for run in runs if run.ended and not all(other.ended for other in runs)):
                run.left_behind()
    for i, run in enumerate(runs):
        run.state = steps.one(states, i)
        run.settle()


class _Once:
    """What a call gives, asked for at most once, however many runs want their part of it."""

    def __init__(self, call: Callable[..., Any], *arguments: Any):
        self._call: Callable[..., Any] | None = functools.partial(call, *arguments)

    def part(self, steps: Steps, i: int) -> Any:
        if self._call:
            self._found, self._call = self._call(), None
        return steps.part(self._found, i)
