import itertools
import json

from hypothesis import given
from hypothesis import strategies as st

from jaxlm.training import position
from jaxlm.training.position import Best, Position
from tests.tiny import resolved


def test_json_gives_a_position_back():
    here = Position(12, "abc", Best(1.5, 2, 30), Best(), (7.25, 3))
    assert position.of_json(json.loads(json.dumps(here._asdict()))) == here


@given(st.integers(1, 200), st.integers(0, 199), st.integers(1, 40), st.integers(0, 30), st.integers(0, 30))
def test_calls_cover_each_step_once_and_do_not_depend_on_where_a_run_resumed(steps, at, per_call, evals, saves):
    cfg = resolved(steps=steps, steps_per_call=per_call, eval__every=evals, checkpoint__every=saves)
    plan = position.calls(0, cfg)
    assert [first + i for first, count in plan for i in range(count)] == list(range(steps))
    ends = {first + count for first, count in plan}
    assert all(n in ends for every in (evals, saves) if every for n in range(every, steps + 1, every))
    assert all(count <= per_call for _, count in plan)
    resume = max((end for end in ends if end <= at), default=0)
    assert position.calls(resume, cfg) == [call for call in plan if call[0] >= resume]


@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 30), st.integers(0, 100))
def test_calls_made_together_stay_in_order_and_are_few_steps_or_one_call(steps, per_call, evals, size):
    plan = position.calls(0, resolved(steps=steps, steps_per_call=per_call, eval__every=evals))
    parts = position.together(plan, size)
    assert [call for part in parts for call in part] == plan
    totals = [sum(count for _, count in part) for part in parts]
    assert all(total <= size or len(part) == 1 for part, total in zip(parts, totals))
    assert all(total + part[0][1] > size for total, part in zip(totals, parts[1:]))  # as many as go


@given(st.lists(st.floats(0, 10), max_size=20), st.floats(0, 1))
def test_best_is_the_lowest_by_more_than_the_margin(values, margin):
    best, stale, lowest = Best(), 0, None
    for value in itertools.chain([float("nan")], values):
        best = best.seen(value, 7, margin)
        if lowest is None or value < lowest - margin:
            if value == value:
                lowest, stale = value, 0
                assert best == Best(lowest, 0, 7)
                continue
        stale += 1
        assert (best.value, best.stale) == (lowest, stale)
