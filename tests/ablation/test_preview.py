"""A study before it runs, in words: its doubts, and what it says that it will do."""

import pytest

from jaxlm.ablation import Range, plan, preview
from jaxlm.ablation.memory import Memory
from jaxlm.errors import ConfigError
from tests.ablation.small import PEAK, arms, small

WIDE = {"clip": {}, "wide": {"data.batch_size": 8}}
TWO = {"tuning": {PEAK: (1e-3, 1e-2)}, "tuning_seeds": (100, 101)}


def doubts(**fields):
    made = small(**fields)
    memory = Memory()
    return preview.doubts(made, arms(made, memory), memory)


# Doubts


def test_a_good_plan_has_no_doubts():
    assert doubts() == []
    assert doubts(**TWO) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seeds": (3,)}, "one seed: nothing can be concluded; give several"),
        (
            {"variants": {"clip": {}, "idle": {"optimizer.scale_by_adam.b2": 0.95}}},
            "variant 'idle' changes nothing: its run is that of the baseline 'clip'",
        ),
        (
            {"variants": {"idle": {}, "clip": {}}},
            "variant 'idle' changes nothing: its run is that of the baseline 'clip'",
        ),
        (
            {"variants": {"clip": {}, "idle": {"log.profile": 2, "checkpoint.every": 1}}},
            "variant 'idle' changes nothing but checkpoint.every, log.profile, on which no result depends: its run is "
            "that of the baseline 'clip'",
        ),
        (
            {"variants": {"clip": {}, "a": {PEAK: 0.01}, "b": {PEAK: "1e-2"}}},
            "variants 'a' and 'b' are alike: one run serves both",
        ),
        (
            {"variants": WIDE, "budget": {"steps": 12}},
            "the arms see different numbers of training tokens: clip 768, wide 1,536",
        ),
        (
            {**TWO, "tuning": {PEAK: (1e-3, 1e-2), "b2": {PEAK: (1e-3, 3e-3, 1e-2)}}},
            "the arms are tuned with different numbers of points: clip 2, no clip 2, b2 3",
        ),
        (
            {**TWO, "tuning": {"b2": {PEAK: (1e-3, 1e-2)}}},
            "the arms are tuned with different numbers of points: clip 0, no clip 0, b2 2",
        ),
        (
            {**TWO, "tuning": {"b2": {PEAK: Range(1e-3, 1e-2)}}, "search": "random", "tuning_trials": 5},
            "the arms are tuned with different numbers of points: clip 0, no clip 0, b2 5",
        ),
    ],
)
def test_what_its_author_may_not_have_meant_is_said(fields, said):
    assert doubts(**fields) == [said]


@pytest.mark.parametrize(
    ("change", "listed"),
    [
        ({"data.batch_size": 3}, "other 6 windows of 16 tokens by 'bytes'"),
        ({"eval.batches": 0}, "other all windows of 16 tokens by 'bytes'"),
        ({"model.context_length": 8}, "other 8 windows of 8 tokens by 'bytes'"),
        ({"data.tokenizer": "chars"}, "other 8 windows of 16 tokens by 'chars'"),
    ],
)
def test_arms_that_are_evaluated_on_different_parts_of_the_text_are_doubtful(change, listed):
    variants = {"clip": {}, "other": change}
    said = (
        f"the arms are evaluated on different parts of the held-out text (clip 8 windows of 16 tokens by 'bytes'; "
        f"{listed}): set eval.batches=0 in overrides, to evaluate the whole split"
    )
    assert said in doubts(variants=variants)
    assert "the arms are evaluated" not in str(doubts(variants=variants, overrides={"eval.batches": 0}))
    assert "the arms are evaluated" not in str(doubts(variants=variants, metric="train/loss"))


def test_arms_that_are_evaluated_on_other_text_are_doubtful():
    variants = {"clip": {}, "other": {"data.validation": "10%"}}
    said = (
        "the arms are evaluated on different text, by data.validation (clip '5%', other '10%'): their eval/loss differ"
    )
    assert said in doubts(variants=variants, overrides={"eval.batches": 0})


def test_alike_arms_that_are_tuned_differently_are_not_alike():
    tuning = {PEAK: (1e-3, 1e-2), "other": {"model.dropout": (0.0, 0.1)}}
    assert doubts(variants={"clip": {}, "other": {}}, tuning=tuning, tuning_seeds=(100,)) == []


def test_a_rest_of_a_step_is_no_different_number_of_tokens():
    fields = {"variants": {"clip": {}, "wide": {"data.batch_size": 5}}, "eval__batches": 5}
    assert doubts(steps=121, **fields) == []
    assert doubts(**fields) == ["the budget is 768 tokens, and steps are whole: wide 800 in 10"]
    (line,) = doubts(variants={"clip": {}}, budget={"flops": 1e3})
    assert line.startswith("the budget is 1,000 FLOPs, and steps are whole: clip ")


def test_a_batch_larger_than_the_budget_spends_more():
    """Its one step is the largest of all arms, by which the tokens of arms may differ."""
    said = "the budget is 768 tokens, and steps are whole: huge 1,536 in 1"
    assert said in doubts(variants={"clip": {}, "huge": {"data.batch_size": 96}})


def test_a_budget_of_seconds_is_spent_in_whole_steps(timed):
    fields = {"variants": WIDE, "eval__batches": 0}
    assert doubts(budget={"seconds": 30}, **fields)[1:] == []
    assert doubts(budget={"seconds": 3}, **fields)[-1] == "the budget is 3 seconds, and steps are whole: wide 4 in 2"


RATE = "optimizer.scale_by_learning_rate"


@pytest.mark.parametrize(
    ("lengths", "listed"),
    [
        ({"warmup": 3}, f"{RATE}.warmup=3.0"),
        ({"schedule": "warmup_stable_decay", "cooldown": 2}, f"{RATE}.cooldown=2"),
        ({"schedule": "piecewise", "boundaries": (0.1, 3)}, f"{RATE}.boundaries=(0.1, 3)"),
        ({"schedule": "inverse_square_root", "timescale": 5.0}, f"{RATE}.timescale=5.0"),
    ],
)
def test_a_schedule_in_steps_does_not_follow_the_budget(lengths, listed):
    overrides = {f"{RATE}.{name}": value for name, value in lengths.items()}
    assert doubts(variants=WIDE, overrides=overrides) == [
        "the arms train for different numbers of steps (clip 12, wide 6), and a schedule's length is given in steps "
        f"({listed}): a fraction below 1 would follow the budget"
    ]
    assert doubts(overrides=overrides) == []


def test_a_token_of_another_tokenizer_is_another():
    fields = {"variants": {"clip": {}, "chars": {"data.tokenizer": "chars"}}, "overrides": {"eval.batches": 0}}
    said = "the arms have different tokenizers (clip 'bytes', chars 'chars')"
    per_token = f"{said}, and eval/loss is per token: compare eval/bits_per_byte"
    text = f"{said}: as many tokens are different amounts of text"
    assert doubts(**fields) == [per_token, text]
    assert doubts(**fields, budget={"steps": 12}) == [per_token]
    assert doubts(**fields, metric="eval/bits_per_byte") == [text]


# What will be done


def lines(**fields):
    said = []
    return preview.describe(small(**fields), said.append).splitlines(), said


def test_a_plan_is_described(timed):
    found, said = lines(variants={**WIDE, "peak": {PEAK: 1e-2}}, seeds=(0, 1, 2), lanes=2, **TWO)
    assert said == ["timing a few steps of the baseline"]
    assert [cfg.data.batch_size for cfg in timed] == [4]
    flops = 768 * plan.cost(arms(small())["clip"]).flops_per_token
    rows = {line.split()[0]: line.split()[1:6] for line in found[4:7]}
    same = ["768", f"{flops:.3g}"]
    assert rows == {"clip": ["3", "4", "12", *same], "wide": ["3", "4", "6", *same], "peak": ["3", "4", "12", *same]}
    assert found[:3] == [
        "Does clipping matter?",
        "metric eval/loss, baseline 'clip', seeds 0, 1, 2",
        "budget: 768 training tokens a trial",
    ]
    assert found[4].endswith(f"{flops:.3g}")
    assert found[5].endswith("data.batch_size 4 -> 8; eval.batches 2 -> 1; steps 12 -> 6")
    assert found[6].endswith(f"{PEAK} 0.001 -> 0.01")
    # 21 trials of as many FLOPs as 12 steps of the baseline, each a second
    assert found[7] == "21 trials in 2 programs, as lanes of up to 2 where that is faster"
    assert found[8].startswith(f"16,128 training tokens, {21 * flops:.3g} FLOPs, about 4.2 minutes here, ")
    assert "at the baseline's 1e+03 ms a step" in found[8]


def test_a_description_has_the_doubts(timed):
    found, _ = lines(seeds=(0,), variants={"clip": {}, "idle": {}})
    assert [line for line in found if line.startswith("doubt: ")] == [
        "doubt: one seed: nothing can be concluded; give several",
        "doubt: variant 'idle' changes nothing: its run is that of the baseline 'clip'",
    ]


@pytest.mark.parametrize(("asked", "tried"), [(0, 3), (2, 2), (3, 3), (50, 3)])
def test_a_grid_counts_the_points_that_it_has(timed, asked, tried):
    found, _ = lines(tuning={PEAK: (1e-3, 3e-3, 1e-2)}, tuning_seeds=(100, 101), tuning_trials=asked)
    assert found[4].split()[:3] == ["clip", "2", str(2 * tried)]


def test_long_differences_are_cut(timed):
    spec = {"chain": ("scale_by_learning_rate",), "scale_by_learning_rate": {"peak": 0.1}}
    found, _ = lines(variants={"clip": {}, "sgd": {"optimizer": spec}})
    assert found[5].endswith("...") and len(found[5]) < 200


@pytest.mark.parametrize("search", ["grid", "random", "halton", "optuna"])
def test_a_tuning_axis_that_is_no_field_is_told_before(timed, search):
    wrong = {"tuning": {"optimizer.scale_by_adam.beta2": (0.9, 0.99)}, "tuning_seeds": (100,), "tuning_trials": 1}
    with pytest.raises(ConfigError, match=r"variant 'clip'.*beta2"):
        lines(search=search, **wrong)
    assert not timed


def test_a_stage_of_no_parameter_is_told_of_its_variant(timed):
    variants = {"clip": {}, "odd": {"optimizer.add_decayed_weights.where": "zzz"}}
    with pytest.raises(ConfigError, match=r"variant 'odd': where='zzz' matches no parameter"):
        lines(variants=variants, budget={"steps": 3})


def test_a_tuning_axis_over_the_batch_gives_each_trial_the_budget(timed):
    found, _ = lines(variants={"clip": {}}, tuning={"data.batch_size": (2, 4, 8)}, tuning_seeds=(100,))
    assert found[5].startswith("5 trials in 3 programs, ")
    assert found[6].startswith(f"{5 * 768:,} training tokens, ")


def test_what_optuna_will_try_is_counted(timed):
    tuning = {"tuning": {PEAK: Range(1e-3, 1e-2)}, "tuning_seeds": (100, 101), "tuning_trials": 5, "search": "optuna"}
    found, _ = lines(variants={"clip": {}}, **tuning)
    assert found[4].split()[:3] == ["clip", "2", "10"]
    assert found[5].startswith("12 trials in 1 programs")


@pytest.mark.parametrize(
    ("score", "patient", "listed"),
    [("final", ("a",), "early (a) count"), ("final", ("a", "clip"), ""), ("best", ("a",), ""), ("final", (), "")],
)
def test_arms_that_choose_among_their_looks_are_told(score, patient, listed):
    variants = {name: {"early_stopping.patience": 3} if name in patient else {PEAK: 0.5} for name in ("clip", "a")}
    said = [line for line in doubts(variants=variants, score=score) if "best of their evaluations" in line]
    assert len(said) == bool(listed) and listed in "".join(said)


def test_an_arm_that_stops_early_without_a_best_step_is_told():
    patient = {"early_stopping.patience": 3, "checkpoint.best": ""}
    (line,) = doubts(variants={"clip": {}, "a": patient})
    assert line.startswith("a may stop early and count where they stopped") and "checkpoint.best is ''" in line
