"""What a study's values say together."""

import math

import numpy as np
import pytest

from jaxlm import optim
from jaxlm.ablation import findings, plan, stats, study, tables, verdicts
from jaxlm.ablation.outcomes import Curve, Outcome
from jaxlm.ablation.variants import grid
from tests.ablation.small import PEAK, small

NAN = math.nan


NOISE = (0.01, -0.02, 0.03, 0.0, -0.01, 0.02)  # of six seeds, in all arms
JITTER = (0.001, -0.002, 0.001, 0.002, -0.001, 0.0)


def outcome(variant, seed, value, status="", **changes):
    status = status or ("done" if math.isfinite(value) else "diverged")
    fields = dict(point={}, tuning=False, status=status, value=value, curve=Curve(*[np.zeros(0)] * 6))
    return Outcome(
        f"{variant}{seed}", variant, seed, tokens=0, flops=0.0, seconds=0.0, joules=NAN, **(fields | changes)
    )


def gathered(outcomes, variants=("clip", "b2"), **fields):
    overrides = {"clip": {}, "b2": {"optimizer.scale_by_adam.b2": 0.9}, "wide": {"data.batch_size": 8}}
    made = small(variants={name: overrides[name] for name in variants}, **{"seeds": range(6), **fields})
    arms = {name: plan.budgeted(made, name, None, plan.Memory()) for name in made.variants}
    return findings.gather(made, arms, {"b2": {PEAK: 1.0}}, outcomes, ["careful"], name="clipping", command="again")


def values_of(effect, jitter=JITTER, seeds=6):
    """The values of b2 where its effect is this, beside the baseline's."""
    base = [outcome("clip", seed, 2.0 + NOISE[seed]) for seed in range(seeds)]
    return base + [outcome("b2", seed, 2.0 + NOISE[seed] + effect + jitter[seed]) for seed in range(seeds)]


def diverged(variant, count, seeds=6):
    """Of so many seeds, the first so many diverged."""
    return [outcome(variant, seed, NAN if seed < count else 2.0 + NOISE[seed % 6]) for seed in range(seeds)]


def test_findings_hold_what_the_report_says():
    outcomes = values_of(0.5)
    found = gathered(outcomes)
    assert (found.name, found.command, found.question) == ("clipping", "again", "Does clipping matter?")
    assert (found.metric, found.lower_is_better, found.baseline) == ("eval/loss", True, "clip")
    assert (found.variants, found.seeds) == (("clip", "b2"), (0, 1, 2, 3, 4, 5))
    assert (found.budget, found.warnings) == ("768 training tokens a trial", ("careful",))
    assert found.outcomes == tuple(outcomes) and found.chosen == {"b2": {PEAK: 1.0}}
    assert found.differences == {"clip": {}, "b2": {"optimizer.scale_by_adam.b2": (0.95, 0.9)}}
    assert found.noise.seeds == 6 and found.noise.mean == pytest.approx(2.0 + np.mean(NOISE))
    assert found.noise.deviation == pytest.approx(np.std(NOISE, ddof=1))
    (comparison,) = found.comparisons
    assert comparison.variant == "b2" and comparison.mean == pytest.approx(0.5 + np.mean(JITTER))


@pytest.mark.parametrize(
    ("outcomes", "fields", "said"),
    [
        (
            values_of(-0.5),
            {},
            "b2 is better than clip: eval/loss -0.4998 [-0.5014, -0.4983] over 6 seeds.",
        ),
        (values_of(0.5), {}, "b2 is worse than clip: eval/loss +0.5002 [+0.4986, +0.5017] over 6 seeds."),
        (
            values_of(0.5),
            {"lower_is_better": False},
            "b2 is better than clip: eval/loss +0.5002 [+0.4986, +0.5017] over 6 seeds.",
        ),
        (
            values_of(-5e-5, [1e-3 * one for one in JITTER]),
            {},
            "b2 is better than clip: eval/loss -0.0000498 [-0.0000514, -0.0000483] over 6 seeds.",
        ),
        (values_of(0.0001), {}, "No difference shown: b2."),
        (values_of(0.0, jitter=[0.0] * 6), {}, "Changes nothing: b2."),
        (values_of(0.5, seeds=1), {"seeds": (0,)}, "Nothing can be concluded: b2."),
        (
            diverged("clip", 0) + diverged("b2", 6),
            {},
            "b2 is worse than clip: it diverged on 6 of 6 seeds, clip on none.",
        ),
        (
            diverged("clip", 0, 9) + diverged("b2", 7, 9),
            {"seeds": range(9)},
            "b2 is worse than clip: it diverged on 7 of 9 seeds, clip on none.",
        ),
        (
            diverged("clip", 0) + diverged("b2", 5),
            {},
            "Nothing can be concluded: b2 (diverged on 5 of 6 seeds, clip on none).",
        ),
        (
            diverged("clip", 6) + diverged("b2", 6),
            {},
            "b2 diverged on 6 of 6 seeds, clip on 6.",
        ),
        (
            diverged("clip", 0, 5) + diverged("b2", 5, 5),  # so few that no test can reject
            {"seeds": range(5)},
            "b2 diverged on 5 of 5 seeds, clip on none.",
        ),
        (
            diverged("clip", 3) + diverged("b2", 0),
            {},
            "No difference shown: b2 (diverged on none of 6 seeds, clip on 3).",
        ),
        (diverged("clip", 0), {"variants": ("clip",)}, f"clip alone: eval/loss {2 + np.mean(NOISE):.3f} over 6 seeds."),
        (
            diverged("clip", 4),
            {"variants": ("clip",)},
            f"clip alone: eval/loss {2 + np.mean(NOISE[4:]):.3f} over 2 seeds.",
        ),
        (diverged("clip", 6), {"variants": ("clip",)}, "clip alone: it finished on no seed."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_verdict_in_words(outcomes, fields, said):
    assert gathered(outcomes, **fields).verdict == said


def test_a_verdict_names_every_variant():
    outcomes = [*values_of(-0.5), *(outcome("wide", seed, 2.0 + NOISE[seed]) for seed in range(6))]
    found = gathered(outcomes, ("clip", "wide", "b2"))
    assert found.verdict.startswith("b2 is better than clip: ") and found.verdict.endswith(". Changes nothing: wide.")


def test_what_chose_a_point_is_not_compared():
    chose = [outcome("b2", seed, -9.0, tuning=True) for seed in range(6)]
    found = gathered([*values_of(0.5), *chose])
    assert found.comparisons == gathered(values_of(0.5)).comparisons
    assert len(found.outcomes) == 18


@pytest.mark.parametrize("status", ["running", "preempted", "interrupted", "failed", None])
def test_a_run_that_is_not_over_did_not_diverge(status):
    """It is left out; as diverged, it would take the verdict away, or give one."""
    outcomes = [one._replace(status=status or "", value=NAN) if one.trial == "b25" else one for one in values_of(-0.5)]
    (comparison,) = gathered(outcomes).comparisons
    assert (comparison.verdict, comparison.lost, len(comparison.seeds)) == ("better", (), 5)
    lost = [one._replace(status="diverged", value=NAN) if one.trial == "b25" else one for one in values_of(-0.5)]
    (comparison,) = gathered(lost).comparisons
    assert (comparison.verdict, comparison.lost) == ("nothing can be concluded", (5,))


def test_a_baseline_with_one_seed_has_no_noise():
    assert gathered(values_of(0.5, seeds=1), seeds=(0,)).noise is None


def test_a_full_grid_has_its_effects():
    axes = {"optimizer.scale_by_adam.b2": (0.9, 0.95), PEAK: (1e-3, 2e-3)}
    made = small(variants=grid(axes), baseline="b2=0.95 peak=0.001", seeds=range(6))
    arms = {name: study.arm(made, name) for name in made.variants}
    outcomes = [
        outcome(name, seed, 2.0 + NOISE[seed] + i + JITTER[(seed + i) % 6])
        for i, name in enumerate(made.variants)
        for seed in range(6)
    ]
    found = findings.gather(made, arms, {}, outcomes, [], name="s", command="")
    assert [one.name for one in found.effects] == [
        "b2 0.9 against 0.95",
        "peak 0.002 against 0.001",
        "b2 0.9 × peak 0.002",
    ]
    rows = [[cell.text for cell in row] for row in tables.tables(found)["effects"].rows]
    assert rows[0][:2] == ["b2 0.9 against 0.95", "6"] and rows[0][2].startswith("-2.0")
    assert gathered(values_of(0.5)).effects == []


def test_changes_are_shown_without_secrets_and_functions_by_their_names(monkeypatch):
    import optax

    def noisy(scale=1.0):
        return optax.scale(scale)

    monkeypatch.setenv("HF_TOKEN", "canary-canary")
    edit = {"optimizer": lambda spec: optim.insert_after(spec, "scale_by_adam", "mine", transform=noisy)}
    variants = {"clip": {}, "mine": edit, "url": {"data.source": "https://user:canary-canary@host/x.txt"}}
    made = small(variants=variants)
    arms = {variant: study.arm(made, variant) for variant in variants}
    found = findings.gather(made, arms, {}, [], ["canary-canary"], name="s", command="")
    (shown,) = [pair for path, pair in found.differences["mine"].items() if path == "optimizer.mine.transform"]
    assert shown[0] is None and "noisy " in shown[1] and "0x" not in shown[1]
    assert "canary" not in str(found)


def test_several_verdicts_of_a_kind_are_listed_best_first():
    effects = {"a": 0.0, "b": -0.2, "c": -0.5, "d": 0.3}
    values = {
        name: {seed: 2.0 + NOISE[seed] + effect * (1 + JITTER[seed]) for seed in range(6)}
        for name, effect in effects.items()
    }
    made = small(variants={name: {} for name in values}, baseline="a", seeds=range(6))
    said = verdicts.verdict(made, stats.compare(values, "a"), values, 3)
    assert said.startswith("Better than a over 6 seeds: c, eval/loss -0.5")
    assert "; b, eval/loss -0.2" in said and "d is worse than a: eval/loss +0.3" in said
    higher = small(variants={name: {} for name in values}, baseline="a", seeds=range(6), lower_is_better=False)
    said = verdicts.verdict(higher, stats.compare(values, "a", lower_is_better=False), values, 3)
    assert "Worse than a over 6 seeds: b, eval/loss -0.2" in said and "; c, eval/loss -0.5" in said
    assert said.startswith("d is better than a: eval/loss +0.3")


def test_a_verdict_shows_small_and_large_metrics_in_a_few_digits():
    made = small(variants={"a": {}, "b": {}}, baseline="a", seeds=range(6))
    for scale, shown in ((1e-9, "-5.000e-10"), (1e200, "-5.000e+199")):
        values = {
            name: {seed: (2.0 + NOISE[seed] + effect * (1 + JITTER[seed])) * scale for seed in range(6)}
            for name, effect in {"a": 0.0, "b": -0.5}.items()
        }
        said = verdicts.verdict(made, stats.compare(values, "a"), values, 3)
        assert f"b is better than a: eval/loss {shown[:5]}" in said and shown[-4:] in said and len(said) < 100
        assert len(verdicts.verdict(small(variants={"clip": {}}), [], {"clip": values["a"]}, 12)) < 60
