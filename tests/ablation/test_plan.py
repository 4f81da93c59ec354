"""A study before it runs: budgets, and what is checked before anything is trained."""

import functools
import operator
import re

import jax
import optax
import pytest

from jaxlm import optim
from jaxlm.ablation import lanes, plan, study
from jaxlm.ablation.memory import Memory
from jaxlm.errors import ConfigError, DataError
from jaxlm.training.prepare import prepare
from tests.ablation.small import PEAK, arms, small, without
from tests.tiny import resolved

TOKENS = 4 * 16  # of a step of the tiny model: its batch size times its context length
WIDE = {"clip": {}, "wide": {"data.batch_size": 8}}
DEEP = {"clip": {}, "deep": {"model.num_layers": 3}}


def steps(**fields):
    return {name: cfg.steps for name, cfg in arms(small(**fields)).items()}


# Budgets


def test_the_cost_of_the_tiny_model_is_that_by_hand():
    # 257 ids, whatever they are padded to
    tokens, attention, mlp, norms = 257 * 16, 4 * 16 * 16 + 4 * 16, 2 * 16 * 64 + 16 + 64, 3 * 2 * 16
    flops = 6 * (tokens + attention + mlp + norms) + 12 * 16 * 16
    assert plan.cost(resolved())[:2] == plan.cost(resolved(seed=3, steps=99))[:2] == (TOKENS, flops)
    assert plan.cost(resolved()).model.vocab_size == 257


def test_all_arms_get_the_baselines_tokens():
    assert steps(variants=WIDE, budget=None) == {"clip": 12, "wide": 6}
    assert steps(variants={"clip": {}, "long": {"model.context_length": 48}}) == {"clip": 12, "long": 4}
    assert steps(variants=WIDE, baseline="wide") == {"clip": 24, "wide": 12}


def test_a_budget_of_tokens_is_spent_to_the_nearest_step():
    assert steps(variants=WIDE, budget={"tokens": 20 * TOKENS}) == {"clip": 20, "wide": 10}
    assert steps(variants=WIDE, budget={"tokens": 20.6 * TOKENS}) == {"clip": 21, "wide": 10}
    assert steps(variants=WIDE, budget={"tokens": 1}) == {"clip": 1, "wide": 1}


def test_a_schedule_has_the_steps_of_the_budget():
    """Whole steps of it, too, may be more than the base has."""
    rate = "optimizer.scale_by_learning_rate"
    overrides = {f"{rate}.schedule": "warmup_stable_decay", f"{rate}.cooldown": 40}
    for budget in ({"steps": 100}, {"tokens": 100 * TOKENS}, {"flops": 100 * TOKENS * 1e6}):
        assert steps(variants=WIDE, overrides=overrides, budget=budget)["clip"] >= 100
    with pytest.raises(ConfigError, match=r"variant 'wide': .* whole steps of its 6"):
        steps(variants={"clip": {}, "wide": {"data.batch_size": 8, **overrides, f"{rate}.cooldown": 9}})


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"model.vocab_size": 10}, ConfigError, "model.vocab_size=10, but the tokenizer"),
        ({"data.source": "/nowhere.txt"}, DataError, "no such file or folder: /nowhere.txt"),
    ],
)
def test_what_a_budget_finds_is_told_of_its_variant(wrong, error, said):
    with pytest.raises(error, match=f"variant 'odd': {said}"):
        steps(variants={"clip": {}, "odd": wrong})
    with pytest.raises(error, match=f"^variant 'clip': {said}"):
        steps(variants={"clip": wrong, "odd": {}})


def test_a_budget_of_steps_is_each_arms():
    assert steps(variants=WIDE, budget={"steps": 7}) == {"clip": 7, "wide": 7}


def test_a_budget_of_flops_gives_a_larger_model_fewer_steps():
    made = small(variants=DEEP)
    small_step, deep_step = (TOKENS * plan.cost(cfg).flops_per_token for cfg in arms(made).values())
    assert deep_step > 1.5 * small_step
    found = steps(variants=DEEP, budget={"flops": 600 * small_step})
    assert found == {"clip": 600, "deep": round(600 * small_step / deep_step)}


def test_a_budget_of_joules_is_kept_by_what_a_step_takes(monkeypatch, tmp_path):
    monkeypatch.setattr(lanes, "joules_per_step", lambda one: 0.5 * one.config.data.batch_size)
    made = small(variants=WIDE, budget={"joules": 60})
    memory = Memory(tmp_path / "study.json")
    found = {name: plan.budgeted(made, name, None, memory) for name in WIDE}
    assert {name: cfg.steps for name, cfg in found.items()} == {"clip": 30, "wide": 15}
    assert plan.budget(made, found) == "60 joules a trial"
    assert sorted(Memory(tmp_path / "study.json").steps["joules"].values()) == [2.0, 4.0]


def test_a_budget_of_seconds_times_each_program_once(timed, tmp_path):
    memory = Memory(tmp_path / "study.json")
    made = small(variants={**WIDE, "peak": {PEAK: 1e-2}}, budget={"seconds": 30})
    assert {name: cfg.steps for name, cfg in arms(made, memory).items()} == {"clip": 30, "wide": 15, "peak": 30}
    arms(made, memory)
    assert [cfg.data.batch_size for cfg in timed] == [4, 8]
    arms(made, Memory(tmp_path / "study.json"))
    assert len(timed) == 2


def test_arms_of_other_batch_sizes_are_evaluated_on_as_many_windows():
    """Which are the same ones then; else a batch size at which nothing is learned would be better than another."""
    variants = {**WIDE, "odd": {"data.batch_size": 3}, "own": {"data.batch_size": 8, "eval.batches": 5}}
    found = arms(small(variants=variants, eval__batches=4))
    assert {name: cfg.eval.batches for name, cfg in found.items()} == {"clip": 4, "wide": 2, "odd": 4, "own": 5}
    assert plan.budgeted(small(variants=WIDE), "clip", {"data.batch_size": 2}, Memory()).eval.batches == 4
    assert {cfg.eval.batches for cfg in arms(small(variants=variants | {"own": {}}, eval__batches=0)).values()} == {0}


def test_what_no_result_depends_on_is_not_timed_anew(timed):
    """Else it would change the steps, and with them every trial."""
    memory = Memory()
    for overrides in ({}, {"log.progress": True, "checkpoint.every": 1}):
        arms(small(variants={"clip": {}}, budget={"seconds": 30}, overrides=overrides), memory)
    assert len(timed) == 1


def test_variants_that_differ_in_what_no_result_depends_on_share_a_trial():
    checked(variants={"clip": {}, "idle": {"log.profile": 2}})


def test_a_point_is_on_top_of_the_arm_and_pays_for_itself():
    cfg = plan.budgeted(small(variants=WIDE), "clip", {"data.batch_size": 2}, Memory())
    assert (cfg.data.batch_size, cfg.steps) == (2, 24)


def test_a_variant_sets_its_steps_only_where_no_budget_does():
    fields = {"variants": {"clip": {}, "longer": {"steps": 20}}}
    for budget in (None, {"tokens": 1000}, {"steps": 20}):
        with pytest.raises(ConfigError, match="variant 'longer' sets steps=20, .* give budget={}"):
            steps(**fields, budget=budget)
    assert steps(**fields, budget={}) == {"clip": 12, "longer": 20}


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (None, "768 training tokens a trial"),
        ({"tokens": 6400}, "6,400 training tokens a trial"),
        ({"steps": 7}, "7 steps a trial"),
        ({"flops": 1.5e9}, "1.5e+09 FLOPs a trial"),
        ({"seconds": 90}, "90 seconds a trial"),
        ({}, "each variant its own number of steps"),
    ],
)
def test_a_budget_in_words(timed, budget, words):
    made = small(budget=budget)
    assert plan.budget(made, arms(made)) == words


# What is checked before anything is trained


def checked(**fields):
    made, memory = small(**fields), Memory()
    arm = functools.partial(plan.budgeted, made, memory=memory)
    plan.check(made, arm, plan.known_trials(made, arm))


def scaled(factor):
    return {"optimizer": {"chain": ("mine", "scale_by_learning_rate"), "mine": {"transform": optax.scale(factor)}}}


def like(index):
    """Scales that no study can tell apart: it does not know what an itemgetter gets."""
    factor = operator.itemgetter(index)
    return optax.stateless(lambda updates, params: jax.tree.map(lambda x: x * factor((0.1, 0.2)), updates))


RATED = {"optimizer.scale_by_learning_rate": {"peak": 0.1}}


def test_functions_that_look_alike_would_share_a_run_and_are_refused():
    """Else the second variant would find the first one's run, and "changes nothing" would be the verdict."""
    said = "weak seed=0 and strong seed=0 differ only in functions that look alike, in optimizer.mine.transform"
    weak, strong = ({**scaled(1), "optimizer.mine.transform": like(index)} | RATED for index in (0, 1))
    with pytest.raises(ConfigError, match=re.escape(said)):
        checked(baseline="weak", variants={"weak": weak, "strong": strong})
    clipped = {"optimizer.mine.transform": optax.clip(1.0)}
    checked(baseline="weak", variants={"weak": weak, "clipped": weak | clipped})
    checked(baseline="weak", variants={"weak": scaled(-0.1) | RATED, "strong": scaled(-0.2) | RATED})


@pytest.mark.parametrize(
    ("metric", "changes", "said"),
    [
        ("eval/nope", {}, "no run writes a metric 'eval/nope'"),
        ("eval/los", {}, "did you mean 'eval/loss'"),
        ("loss", {}, "did you mean 'eval/loss'"),
        ("train/los", {}, "did you mean 'train/loss'"),
        ("eval/loss", {"eval__every": 0}, "'eval/loss' takes evaluations; set eval.every and data.validation"),
    ],
)
def test_a_metric_that_no_trial_will_write_is_refused_before_one_is_trained(metric, changes, said):
    with pytest.raises(ConfigError, match=said):
        checked(metric=metric, **changes)


@pytest.mark.parametrize("metric", ["eval/gap", "train/objective", "optim/grad_norm", "throughput/step_ms"])
def test_metrics_that_trials_write_are_taken(metric):
    checked(metric=metric)


@pytest.mark.parametrize("search", ["grid", "random", "halton", "optuna"])
def test_points_that_differ_in_functions_that_look_alike_are_refused(search):
    """Else the second point would get the first one's loss, and never be chosen."""
    axes = {"optimizer.mine.transform": (like(0), like(1)), PEAK: (0.1, 0.2)}
    tuned = {"tuning": axes, "tuning_seeds": (100,), "search": search, "tuning_trials": 4}
    with pytest.raises(ConfigError, match=r"clip .* differ only in functions .* optimizer.mine.transform"):
        checked(variants={"clip": scaled(0.1) | RATED}, **tuned)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (without("scale_by_learning_rate"), "optimizer.chain has no learning rate"),
        ({"strict": True, "optimizer.add_decayed_weights.where": "biases"}, "biases"),
        ({"eval.tasks": ("clasify",)}, "unknown task 'clasify': did you mean 'classify'"),
        ({"eval.tasks": ("perplexity",), "eval.every": 0}, "needs data.validation and eval.every"),
        ({"log.writers": ("tensorboard",)}, "log.writers is .* without 'jsonl', where a study reads its metrics"),
        ({"log.carbon_intensity": "-5"}, "log.carbon_intensity is '-5'"),
        ({"checkpoint.best": "eval/los"}, "checkpoint.best is 'eval/los', .* did you mean 'eval/loss'"),
        ({"parallel.data": 7}, "7"),
        (
            {"early_stopping.metric": "-eval/acuracy", "early_stopping.patience": 2},
            "early_stopping.metric is '-eval/acuracy', .* did you mean 'eval/accuracy'",
        ),
    ],
)
def test_what_a_run_would_find_late_is_told_before_of_its_variant(wrong, said):
    with pytest.raises(ConfigError, match=f"variant 'odd': .*{said}"):
        checked(variants={"clip": {}, "odd": wrong})


def test_what_a_run_would_take_is_not_refused():
    averaged = {
        "optimizer": lambda spec: optim.insert_after(spec, "scale_by_learning_rate", "ema_of_params", decay=0.9)
    }
    variants = {
        "clip": {"early_stopping.metric": "any", "checkpoint.best": ""},  # without patience nobody looks
        "average": {**averaged, "checkpoint.best": "eval/ema_loss"},
        "task": {"eval.tasks": ("perplexity",), "checkpoint.best": "eval/of_a_task"},
        "never": {"eval.every": 0, "checkpoint.best": "any"},
    }
    checked(variants=variants)


def test_optuna_may_propose_every_value_of_an_axis():
    tuned = {"tuning": {"optimizer.scale_by_learning_rate.schedule": ("cosine", "linear", "linearr")}}
    with pytest.raises(ConfigError, match="variant 'clip': unknown schedule 'linearr'"):
        checked(variants={"clip": {}}, **tuned, tuning_seeds=(100,), search="optuna", tuning_trials=1)


def test_a_point_is_checked_once_for_all_seeds(monkeypatch):
    asked = []
    monkeypatch.setattr(plan, "prepare", lambda cfg: asked.append(cfg) or prepare(cfg))
    resolved = []
    monkeypatch.setattr(plan, "arm", lambda *given: resolved.append(given) or study.arm(*given))
    checked(variants={"clip": {}}, tuning={PEAK: (0.011, 0.012)}, tuning_seeds=range(100, 105))
    # two points and the arm without one; and the model once, for what a step costs
    assert len(asked) <= 4
    assert len(resolved) == 6  # and each time the baseline, whose tokens are the budget
