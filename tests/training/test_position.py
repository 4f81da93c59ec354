import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.errors import ConfigError
from jaxlm.training import position
from jaxlm.training.position import Best, Position
from tests.tiny import resolved


def test_json_gives_a_position_back():
    here = Position(12, "abc", Best(1.5, 2, 30), Best(), (7.25, 3))
    assert position.of_json(json.loads(json.dumps(here._asdict()))) == here
    earlier = {name: value for name, value in here._asdict().items() if name != "validation"}
    assert position.of_json(json.loads(json.dumps(earlier))) == here


@given(st.integers(1, 200), st.integers(0, 199), st.integers(1, 40), st.integers(0, 30), st.integers(0, 30))
def test_calls_cover_each_step_once_and_do_not_depend_on_where_a_run_resumed(steps, at, per_call, evals, saves):
    cfg = resolved(steps=steps, steps_per_call=per_call, eval__every=evals, checkpoint__every=saves)
    plan = list(position.calls(0, cfg))
    assert [first + i for first, count in plan for i in range(count)] == list(range(steps))
    ends = {first + count for first, count in plan}
    assert all(n in ends for every in (evals, saves) if every for n in range(every, steps + 1, every))
    assert all(count <= per_call for _, count in plan)
    resume = max((end for end in ends if end <= at), default=0)
    assert list(position.calls(resume, cfg)) == [call for call in plan if call[0] >= resume]


@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 30), st.integers(0, 100))
def test_calls_made_together_stay_in_order_and_are_few_steps_or_one_call(steps, per_call, evals, size):
    plan = list(position.calls(0, resolved(steps=steps, steps_per_call=per_call, eval__every=evals)))
    parts = list(position.together(plan, size))
    assert [call for part in parts for call in part] == plan
    totals = [sum(count for _, count in part) for part in parts]
    assert all(total <= size or len(part) == 1 for part, total in zip(parts, totals))
    assert all(total + part[0][1] > size for total, part in zip(totals, parts[1:]))  # as many as go


def test_the_calls_of_a_long_run_are_not_listed_before_its_first():
    parts = position.together(position.calls(0, resolved(steps=2**31 - 1, steps_per_call=1, eval__every=0)), 2)
    assert next(parts) == [(0, 1), (1, 1)]


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


def test_an_evaluation_is_judged_by_the_metrics_that_the_config_names():
    fields = {"checkpoint__best": "-eval/accuracy", "early_stopping__patience": 2, "early_stopping__min_delta": 0.1}
    cfg, here, said = resolved(**fields), Position(0, ""), []
    for step, (loss, accuracy) in enumerate([(2.0, 0.3), (1.95, 0.4), (1.8, 0.1), (1.75, 0.2), (1.71, 0.5)]):
        here, stale = position.judged(here, cfg, {"eval/loss": loss, "eval/accuracy": accuracy}, step)
        said.append(stale)
    assert here.best == Best(-0.5, 0, 4, "-eval/accuracy")
    assert here.patience == Best(1.8, 2, 2, "eval/loss")
    assert said == [""] * 4 + ["eval/loss has not improved on 1.8000"]
    nan = {"eval/loss": math.nan, "eval/accuracy": 0.0}
    now, _ = position.judged(Position(0, ""), cfg, nan, 0)
    assert position.judged(now, cfg, nan, 1)[1] == "eval/loss was never finite"
    with pytest.raises(ConfigError, match="checkpoint.best is '-eval/accuracy', and no evaluation gives that"):
        position.judged(here, cfg, {"eval/loss": 1.0}, 5)


def test_nothing_is_judged_where_nothing_asks_for_it():
    cfg = resolved(checkpoint__best="", early_stopping__patience=0, early_stopping__metric="eval/none")
    assert position.judged(Position(0, ""), cfg, {"eval/loss": 1.0}, 3) == (Position(0, ""), "")


def test_another_metric_begins_anew():
    by_accuracy = {"checkpoint__best": "-eval/accuracy", "early_stopping__metric": "-eval/accuracy"}
    metrics = {"eval/loss": 3.0, "eval/accuracy": 0.2}
    here, _ = position.judged(Position(0, ""), resolved(**by_accuracy, early_stopping__patience=1), metrics, 1)
    here, stale = position.judged(here, resolved(checkpoint__best="eval/loss", early_stopping__patience=1), metrics, 2)
    assert (here.best, here.patience, stale) == (Best(3.0, 0, 2, "eval/loss"), Best(3.0, 0, 2, "eval/loss"), "")
    before = position.of_json({**here._asdict(), "best": [3.0, 0, 2], "patience": [3.0, 0, 2]})  # no name was noted
    assert before.best.of("eval/loss") == here.best


def test_what_is_to_rise_is_told_as_it_is():
    cfg = resolved(early_stopping__metric="-eval/accuracy", early_stopping__patience=1)
    now = position.Position(0, "")
    for value in (0.25, 0.125):
        now, said = position.judged(now, cfg, {"eval/loss": 1.0, "eval/accuracy": value}, 1)
    assert said == "eval/accuracy has not improved on 0.2500"


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [(8, 4, {4, 8}), (45, 20, {19, 20, 39, 40, 44, 45}), (30, 100, {28, 29, 30}), (5, 0, set())],
)
def test_the_steps_whose_losses_the_gap_is_about(steps, every, expected):
    near = position.before_evaluation(resolved(steps=steps, eval__every=every))
    assert {step for step in range(1, steps + 1) if near(step)} == expected


@pytest.mark.parametrize(
    ("changes", "judging"),
    [
        ({"checkpoint__best": "-eval/ema_accuracy"}, ["ema"]),
        ({"early_stopping__patience": 3, "early_stopping__metric": "eval/ema_loss"}, ["ema"]),
        ({"early_stopping__metric": "eval/ema_loss"}, []),  # which stops nothing
        ({"checkpoint__best": "eval/loss"}, []),
        ({"checkpoint__best": ""}, []),
    ],
)
def test_a_run_is_judged_by_an_average_where_its_metric_is_one_s(changes, judging):
    assert position.judging(resolved(**changes), {"", "ema"}) == judging


def test_a_run_without_checkpoints_has_no_best_step_to_return_to():
    metrics = {"eval/loss": 1.0}
    for every, expected in ((4, 4), (0, None)):
        cfg = resolved(steps=8, early_stopping__patience=1, checkpoint__every=every)
        now, _ = position.judged(position.Position(0, ""), cfg, metrics, 4)
        now, stale = position.judged(now, cfg, metrics, 6)
        assert stale and position.result(now, cfg, 6) == expected
