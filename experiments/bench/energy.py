"""Suite `energy`: joules per token of training, beside PyTorch's, by `telemetry.energy`: a counter where there is one,
else codecarbon's estimate, which the figures then say. All of the machine's, what it takes idle included."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from experiments.bench import machine
from experiments.bench.cases import BABY, NANO, Case
from experiments.bench.remote import Remote
from experiments.bench.report import Row, single
from experiments.bench.step import PEER, STEPS, agree
from experiments.bench.timing import interleave

SECONDS = 8.0  # of a block: an estimate is drawn from a load that is looked at now and then


def run(quick: bool) -> list[Row]:
    return measure(NANO, 0.2, rounds=2) if quick else measure(BABY, SECONDS, rounds=5)


def measure(case: Case, seconds: float, rounds: int) -> list[Row]:
    """Millijoules per token.

    Raises:
      Disagreement: the sides don't train the same model.
    """
    from jaxlm.telemetry import energy

    with contextlib.ExitStack() as stack:
        meter = stack.enter_context(energy.meter("estimate", machine.say))
        if meter is None:
            return []
        ours = stack.enter_context(Remote("experiments.bench.ours:Ours", case))
        weights, sides = ours.call("weights"), {"jaxlm": ours}
        if machine.has("torch", "transformers"):
            sides[PEER] = stack.enter_context(Remote("experiments.bench.peer:Peer", case, weights))
        losses = {name: side.call("run", 0, STEPS)[0] for name, side in sides.items()}
        if PEER in sides:
            agree(losses["jaxlm"], losses[PEER])
        done = dict.fromkeys(sides, STEPS)

        def block(name: str) -> Callable[[], float]:
            def used() -> float:
                begin, before, steps = time.perf_counter(), meter.read(), 0
                while time.perf_counter() - begin < seconds:
                    sides[name].call("run", done[name], 2)
                    done[name] += 2
                    steps += 2
                return (meter.read() - before) / (steps * case.tokens_per_step) * 1e3

            return used

        machine.say(f"energy: {case.name}, {rounds} rounds")
        found = interleave({name: block(name) for name in sides}, rounds)
    what = f"{case.name}: energy per token, {meter.name}"
    rows = [Row("energy", what, "mJ", found["jaxlm"], f"{PEER}, eager" if PEER in found else "", found.get(PEER))]
    return rows + ([Row("energy", "idle", "W", single(meter.idle))] if meter.idle is not None else [])
