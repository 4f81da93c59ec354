"""Suite `step`: training steps of jaxlm beside PyTorch's, from the same weights, on the same batches.

Nothing is timed before the losses of both have agreed. Each side is a process of its own; blocks of steps run in
turn, and while one side works the others wait in a read.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence

from experiments.bench import machine
from experiments.bench.cases import BABY, TINY, Case
from experiments.bench.remote import Remote
from experiments.bench.report import Limit, Row, single
from experiments.bench.timing import interleave

STEPS = 20  # steps whose losses are compared
BOUND = 1e-4  # relatively. In fp32 equal sides are within 1e-5; the tiny model without weight decay is 2e-4 off
MANY = 32  # steps a call, where several are tried
PEER = "PyTorch"
COMPILED = "PyTorch, torch.compile"
PLAIN = "plain jax.numpy"


class Disagreement(Exception):
    """Two sides that should train the same model don't: their times would compare nothing."""


def agree(ours: Sequence[float], theirs: Sequence[float], bound: float = BOUND, who: str = PEER) -> float:
    """The largest relative difference of the losses of two runs, step by step.

    Raises:
      Disagreement: it is above `bound`, a loss is not finite, or there are too few to compare.
    """
    if len(ours) < 2 or len(ours) != len(theirs):
        raise Disagreement(f"jaxlm has {len(ours)} losses, {who} {len(theirs)}; expected as many, and two or more")
    found = [abs(a - b) / abs(b) if b else math.inf for a, b in zip(ours, theirs)]
    for n, (a, b, difference) in enumerate(zip(ours, theirs, found)):
        if not difference <= bound:
            raise Disagreement(
                f"step {n}: jaxlm's loss is {a:.6f}, {who}'s {b:.6f}: {difference:.1e} apart, more than {bound:g}"
            )
    return max(found)


def run(quick: bool) -> list[Row]:
    rows = measure(TINY, rounds=3 if quick else 15, block=MANY, many=MANY, floor=15_000)
    return rows if quick else rows + measure(BABY, rounds=9, block=2)


def measure(case: Case, *, rounds: int, block: int, many: int = 0, floor: float | None = None) -> list[Row]:
    """Figures of a case.

    Args:
      rounds: blocks of each side.
      block: steps in a block.
      many: steps a call of a further row of jaxlm's, of which `block` is a multiple; 0: none.
      floor: tokens per second that jaxlm is meant to reach.

    Raises:
      Disagreement: the sides don't compute the same losses.
    """
    with contextlib.ExitStack() as stack:
        machine.say(f"{case.name}: compiling")
        ours = stack.enter_context(Remote("experiments.bench.ours:Ours", case))
        sides = {"jaxlm": ours}
        weights = ours.call("weights")
        first = ours.call("first")
        losses = {"jaxlm": first.losses + ours.call("run", 1, STEPS - 1)[0]}
        done = {"jaxlm": STEPS}
        peer = machine.has("torch", "transformers")
        their_first = None
        if peer:
            for name, compiled in ((PEER, False), (COMPILED, True)):
                sides[name] = stack.enter_context(Remote("experiments.bench.peer:Peer", case, weights, compiled))
                one, seconds = sides[name].call("first")
                their_first = their_first or seconds
                losses[name] = one + sides[name].call("run", 1, STEPS - 1)[0]
                done[name] = STEPS
        else:
            machine.say("PyTorch and transformers are not both here: jaxlm stands alone, and unchecked")
        if many:
            sides["many"] = stack.enter_context(Remote("experiments.bench.ours:Ours", case, {"steps_per_call": many}))
            calls = -(-STEPS // many) * many
            begun = sides["many"].call("first").losses
            rest = sides["many"].call("run", many, calls - many)[0] if calls > many else []
            losses["many"] = (begun + rest)[:STEPS]
            done["many"] = calls

        machine.say(f"{case.name}: the same by hand")
        by_hand = sides[PLAIN] = stack.enter_context(Remote("experiments.bench.plain:Plain", case, weights))
        losses[PLAIN] = by_hand.call("first")[0] + by_hand.call("run", 1, STEPS - 1)[0]
        done[PLAIN] = STEPS
        agree(losses["jaxlm"], losses[PLAIN], BOUND, who=PLAIN)

        rows: list[Row] = []
        if many:
            agree(losses["many"], losses["jaxlm"], BOUND, who="jaxlm at one step a call")
        if peer:
            found = agree(losses["jaxlm"], losses[PEER], BOUND)
            agree(losses["jaxlm"], losses[COMPILED], BOUND)
            figure = f"{case.name}: losses of {STEPS} steps, largest relative difference"
            rows.append(Row("step", figure, "", single(found), limit=Limit("value", "<=", BOUND)))
            machine.say(f"{case.name}: losses agree to {found:.1e}")

        def block_of(name: str) -> Callable[[], float]:
            def timed() -> float:
                _, seconds = sides[name].call("run", done[name], block)
                done[name] += block
                return seconds / block * 1e3

            return timed

        machine.say(f"{case.name}: {rounds} rounds of {block} steps")
        times = interleave({name: block_of(name) for name in sides}, rounds)
        kind = f"{PEER}, eager, {sides[PEER].call('facts')} AdamW" if peer else ""

    def two(what: str, name: str) -> list[Row]:
        """A step's milliseconds, and tokens per second."""
        ours_ms, theirs_ms = times[name], times.get(PEER)
        ours_rate, theirs_rate = (
            ms and ms.map(lambda x: 1e3 * case.tokens_per_step / x) for ms in (ours_ms, theirs_ms)
        )
        assert ours_rate is not None
        at_least = None if floor is None else Limit("value", ">=", floor)
        return [
            Row("step", f"{case.name}: a step{what}", "ms", ours_ms, kind, theirs_ms, Limit("ratio", "<=", 1.5)),
            Row("step", f"{case.name}: tokens per second{what}", "", ours_rate, kind, theirs_rate, at_least),
        ]

    hand_ms = Limit("ratio", "<=", 1.03)
    rows.append(
        Row("step", f"{case.name}: a step, beside JAX by hand", "ms", times["jaxlm"], PLAIN, times[PLAIN], hand_ms)
    )
    rows += two("", "jaxlm") + (two(f", {many} steps a call", "many") if many else [])
    if peer:
        rows.append(
            Row("step", f"{case.name}: a step", "ms", times["jaxlm"], f"{PEER}, torch.compile", times[COMPILED])
        )
    beside = (PEER, single(their_first)) if their_first is not None else ("", None)
    rows.append(Row("step", f"{case.name}: first step, from call to loss", "s", single(first.seconds), *beside))
    rows.append(Row("step", f"{case.name}: of which compiling (lower + compile)", "s", single(first.compile)))
    return rows
