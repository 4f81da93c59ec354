"""Suite `switches`: what a switch of speed or memory does to a step, beside the case as it is: its time, and the memory
that the compiled step takes. From the same weights, on the same batches; the losses must agree first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from experiments.bench import machine
from experiments.bench.cases import BABY, NANO, TINY, WIDE, Case
from experiments.bench.remote import Remote
from experiments.bench.report import Row, single
from experiments.bench.step import agree
from experiments.bench.timing import interleave

STEPS = 6  # whose losses are compared
HALF = 2e-2  # relatively: losses in bf16 to those in fp32
FREED = "memory handed back to the system"


class Switch(NamedTuple):
    case: Case
    fields: Mapping[str, Any]  # of the config
    block: int = 2  # steps timed at a time
    keep: bool = True  # freed memory, as doors do
    bound: float = 1e-4  # of the losses' relative difference

    @property
    def name(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.fields.items()) or FREED


SWITCHES = (
    Switch(TINY, {"steps_per_call": 32}, 64),
    Switch(TINY, {"model.unroll": False}, 64),
    Switch(TINY, {}, 64, keep=False),
    Switch(BABY, {"model.unroll": False}),
    Switch(BABY, {}, keep=False),
    Switch(BABY, {"model.remat": "dots"}),
    Switch(BABY, {"model.remat": "block"}),
    Switch(BABY, {"data.micro_batches": 4}),
    Switch(BABY, {"model.dtype": "bfloat16"}, bound=HALF),
    Switch(WIDE, {"model.loss_chunks": 0}),
    Switch(WIDE, {"model.loss_chunks": 8}),
)


def run(quick: bool) -> list[Row]:
    small = (
        Switch(NANO, {"model.remat": "block"}),
        Switch(NANO, {"steps_per_call": 2}, 4),
        Switch(NANO, {}, keep=False),
    )
    return [row for switch in (small if quick else SWITCHES) for row in measure(switch, rounds=2 if quick else 5)]


def measure(switch: Switch, rounds: int) -> Iterator[Row]:
    """A step's time and memory, with the switch and without it.

    Raises:
      Disagreement: it changes the losses.
    """
    case, name = switch.case, switch.name
    machine.say(f"switches: {case.name}, {name}")
    per_call = switch.fields.get("steps_per_call", 1)
    with (
        Remote("experiments.bench.ours:Ours", case) as plain,
        Remote("experiments.bench.ours:Ours", case, switch.fields, switch.keep) as other,
    ):
        steps = -(-STEPS // per_call) * per_call  # of whole calls
        agree(
            other.call("run", 0, steps)[0][:STEPS], plain.call("run", 0, steps)[0][:STEPS], switch.bound, "without it"
        )
        done = {"with": steps, "without": steps}

        def block(key: str, side: Remote) -> Callable[[], float]:
            def timed() -> float:
                _, seconds = side.call("run", done[key], switch.block)
                done[key] += switch.block
                return float(seconds) / switch.block * 1e3

            return timed

        times = interleave({"with": block("with", other), "without": block("without", plain)}, rounds)
        yield Row("switches", f"{case.name}, {name}: a step", "ms", times["with"], "without", times["without"])
        if switch.keep and per_call == 1:
            with_it, without = (single(side.call("bytes") / 1e6) for side in (other, plain))
            yield Row("switches", f"{case.name}, {name}: memory of a step", "MB", with_it, "without", without)
