"""Suite `lanes`: K trials as lanes of one program, beside the same trials one after another. Both are compiled once and
scan over several steps a call; seeds and peak learning rates differ. The first lane's losses must agree first.

One after another means: one trial of them is timed, and the others would take as long.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from experiments.bench import machine
from experiments.bench.cases import NANO, PEAK, TINY, Case, batches, settings
from experiments.bench.remote import Remote
from experiments.bench.report import Limit, Row
from experiments.bench.step import agree
from experiments.bench.timing import interleave

STUDY = Case("study", 2, 4, 64, 64, 16, vocab_size=256, unroll=True)  # as configs/ablation.py
COUNTS = (1, 4, 16, 64)


class Plan(NamedTuple):
    case: Case
    counts: tuple[int, ...]
    steps: int  # in a call
    rounds: int
    limits: dict[int, float] = {}  # lanes -> how many times as fast they are to be


def run(quick: bool) -> list[Row]:
    if quick:
        return list(measure(Plan(NANO, (1, 4), steps=4, rounds=2)))
    return [*measure(Plan(STUDY, COUNTS, steps=10, rounds=7)), *measure(Plan(TINY, COUNTS, steps=4, rounds=5))]


def measure(plan: Plan) -> Iterator[Row]:
    """Steps per second, all lanes together.

    Raises:
      Disagreement: a lane is not the trial alone.
    """
    with Remote("experiments.bench.lanes:Side", plan.case, 0, plan.steps) as alone:
        expected = alone.call("losses")
        for count in plan.counts:
            machine.say(f"lanes: {plan.case.name}, {count} lanes, {plan.rounds} rounds")
            with Remote("experiments.bench.lanes:Side", plan.case, count, plan.steps) as side:
                agree(side.call("losses"), expected)

                def rate(far: Remote, lanes: int) -> Callable[[], float]:
                    return lambda: lanes * plan.steps / far.call("seconds")

                found = interleave({"lanes": rate(side, count), "alone": rate(alone, 1)}, plan.rounds)
            limit = Limit("ratio", ">=", plan.limits[count]) if count in plan.limits else None
            what = f"{plan.case.name}: steps per second of {count} lanes"
            yield Row("lanes", what, "", found["lanes"], "one after another", found["alone"], limit)


class Side:
    """Trials in training: so many lanes, or one alone (0), by calls of several steps."""

    def __init__(self, case: Case, lanes: int, steps: int) -> None:
        from jaxlm import config
        from jaxlm.training import step
        from jaxlm.training.host import keep_memory
        from jaxlm.training.steps import build

        keep_memory()  # as the doors do
        trials = []
        for i in range(max(lanes, 1)):
            c = settings(case)
            c.seed = i
            c.optimizer.scale_by_learning_rate["peak"] = PEAK * (1 + i / 64)
            trials.append(config.resolve(c))
        self._steps, self._count = build(trials[0], lanes), steps
        numbers = [step.split(cfg)[1] for cfg in trials]
        inits = [self._steps.init(cfg.seed, hparams, None) for cfg, hparams in zip(trials, numbers)]
        self._states, self._numbers = self._steps.together(inits), self._steps.stacked(numbers)
        rows = batches(case).rows(0, steps * case.batch_size)
        shaped = {name: x.reshape(steps, case.batch_size, -1) for name, x in rows.items()}
        self._batch = self._steps.batch([shaped] * len(trials))

    def losses(self) -> list[float]:
        """Of the first trial, in the first call, which compiles."""
        self._states, metrics = self._steps.advance(self._numbers, self._states, self._batch, self._count)
        found: list[float] = self._steps.part(self._steps.fetch(metrics), 0)["train/loss"].tolist()
        return found

    def seconds(self) -> float:
        """Of a call."""
        begin = time.perf_counter()
        self.losses()
        return time.perf_counter() - begin
