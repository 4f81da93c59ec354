"""Effects of a grid, against calculations by hand."""

import math

import numpy as np
import pytest

from jaxlm.ablation import factorial, stats
from jaxlm.ablation.variants import grid, one_at_a_time

A, B, C = "optimizer.a", "optimizer.b", "model.c"
NOISE = (0.1, -0.2, 0.05, 0.0)
OWN = np.random.default_rng(0).normal(size=(6, 4)) * 0.01


def values_of(variants, effect):
    return {
        name: {seed: effect(point) + NOISE[seed] + OWN[i, seed] for seed in range(4)}
        for i, (name, point) in enumerate(variants.items())
    }


def test_main_effects_and_interactions_of_two_fields_are_those_by_hand():
    variants = grid({A: (1, 2, 3), B: (0.9, 0.99)})
    values = values_of(variants, lambda p: p[A] + 10 * p[B] + (5 if p[A] == 3 and p[B] == 0.9 else 0))
    found = factorial.effects(variants, "a=1 b=0.99", values, 0.95)
    y = {name: np.array(list(of.values())) for name, of in values.items()}
    hand = {
        "a 2 against 1": (y["a=2 b=0.9"] + y["a=2 b=0.99"] - y["a=1 b=0.9"] - y["a=1 b=0.99"]) / 2,
        "a 3 against 1": (y["a=3 b=0.9"] + y["a=3 b=0.99"] - y["a=1 b=0.9"] - y["a=1 b=0.99"]) / 2,
        "b 0.9 against 0.99": sum(y[f"a={a} b=0.9"] - y[f"a={a} b=0.99"] for a in (1, 2, 3)) / 3,
        "a 2 × b 0.9": y["a=2 b=0.9"] - y["a=2 b=0.99"] - y["a=1 b=0.9"] + y["a=1 b=0.99"],
        "a 3 × b 0.9": y["a=3 b=0.9"] - y["a=3 b=0.99"] - y["a=1 b=0.9"] + y["a=1 b=0.99"],
    }
    assert [one.name for one in found] == list(hand)
    p = stats.holm([stats.t_test(contrast) for contrast in hand.values()])
    for one, contrast, corrected in zip(found, hand.values(), p):
        assert one.seeds == 4 and one.mean == pytest.approx(contrast.mean())
        assert one.deviation == pytest.approx(contrast.std(ddof=1))
        assert one.p_corrected == pytest.approx(corrected)
        assert (one.interval[0] > 0 or one.interval[1] < 0) == (one.p_corrected < 0.05)
    assert found[-1].mean == pytest.approx(5, abs=0.1) and found[-1].p_corrected < 0.05


def test_of_three_fields_the_third_is_averaged_out():
    variants = grid({A: (1, 2), B: (1, 2), C: (1, 2)})
    values = {name: {seed: p[A] * p[B] + 7.0 * p[C] + NOISE[seed] for seed in range(4)} for name, p in variants.items()}
    found = {one.name: one.mean for one in factorial.effects(variants, "a=1 b=1 c=1", values, 0.95)}
    assert found == pytest.approx(
        {
            "a 2 against 1": 1.5,
            "b 2 against 1": 1.5,
            "c 2 against 1": 7.0,
            "a 2 × b 2": 1.0,
            "a 2 × c 2": 0.0,
            "b 2 × c 2": 0.0,
        },
        abs=1e-9,
    )


def test_what_rounding_leaves_is_no_effect():
    variants = grid({A: (1, 2), B: (1, 2)})
    values = {name: {seed: 0.1 * p[A] + 0.7 * p[B] + seed / 3 for seed in range(4)} for name, p in variants.items()}
    interaction = factorial.effects(variants, "a=1 b=1", values, 0.95)[-1]
    assert (interaction.mean, interaction.deviation, interaction.p) == (0.0, 0.0, 1.0)


def test_only_seeds_on_which_all_cells_finished_count():
    variants = grid({A: (1, 2), B: (1, 2)})
    values = values_of(variants, lambda p: p[A])
    values["a=2 b=2"][1] = math.nan
    assert {one.seeds for one in factorial.effects(variants, "a=1 b=1", values, 0.95)} == {3}
    lost = {name: dict.fromkeys(of, math.nan) for name, of in values.items()}
    assert all(math.isnan(one.mean) for one in factorial.effects(variants, "a=1 b=1", lost, 0.95))


@pytest.mark.parametrize(
    "variants",
    [
        {"base": {}, **grid({A: (1, 2), B: (1, 2)})},
        {name: point for name, point in grid({A: (1, 2), B: (1, 2)}).items() if name != "a=2 b=2"},
        grid({A: (1, 2)}),
        grid({A: (1, 2), B: (1,)}),
        one_at_a_time({A: (1, 2), B: (1, 2)}),
    ],
)
def test_what_is_no_full_grid_has_no_effects(variants):
    assert factorial.effects(variants, next(iter(variants)), values_of(variants, lambda p: 0.0), 0.95) == []
