import functools

import jax
import optax
import pytest

from jaxlm import optim, tree
from jaxlm.errors import ConfigError
from jaxlm.model import gpt2
from jaxlm.optim import review
from jaxlm.optim.stages import stages
from jaxlm.optim.ways import ways
from tests.optim.small import DEFAULT, PARAMS
from tests.tiny import resolved

ADAM, DECAY = {"b1": 0.9}, {"weight_decay": 0.1, "where": "kernels"}
RATE = {"peak": 1e-3, "schedule": "warmup_cosine"}
TABLES = {"add_decayed_weights": DECAY, "scale_by_learning_rate": RATE, "clip_by_global_norm": {"max_norm": 1.0}}


FLAT = {"peak": 1e-3}
L2 = {"transform": "add_decayed_weights", "where": "kernels"}


def max_norm(value):
    return {"clip_by_global_norm": {"max_norm": value}}


SEARCH = {
    "scale_by_backtracking_linesearch": {"max_backtracking_steps": 3},
    "scale_by_zoom_linesearch": {"max_linesearch_steps": 3},
}


def found(*names, **tables):
    return {finding.rule for finding in optim.check({"chain": names, **TABLES, **tables}, PARAMS)}


@pytest.mark.parametrize(
    "spec",
    [
        DEFAULT,
        {"chain": ("adamw",), "adamw": {**RATE, "weight_decay": 0.0}},
        {"chain": ("sgd",), "sgd": {"learning_rate": 0.1}},
        {"chain": ("prodigy",)},  # with a learning rate of its own
        {
            "chain": ("l2", "scale_by_adam", "scale_by_learning_rate"),
            "l2": {"transform": "add_decayed_weights", "weight_decay": 0.1, "where": "kernels"},
            "scale_by_learning_rate": RATE,
        },
        {"chain": ("scale_by_adam", "scale"), "scale": {"step_size": -0.1}},
        {**DEFAULT, "chain": (*DEFAULT["chain"], "proximal_l1"), "proximal_l1": {"l1": 1e-4}},
        {"chain": ("muon",), "muon": {"peak": 1e-3, "weight_decay": 0.1, "adam_weight_decay": 0.1}},
        {"chain": ("skip_nonfinite", "freeze", "adam"), "freeze": {"where": "embeddings"}, "adam": {"peak": 1e-3}},
        {
            "chain": ("lookahead", "clip_by_global_norm", "partition"),
            "clip_by_global_norm": {"max_norm": 1.0},
            "partition": {"a": {"where": "kernels", "chain": ("adam",)}, "b": {"where": "rest", "chain": ()}},
            "adam": {"peak": 1e-3},
        },
        {  # groups of what `freeze` leaves
            "chain": ("freeze", "partition"),
            "freeze": {"where": "embeddings"},
            "partition": {"a": {"where": "kernels", "chain": ("sgd",)}, "b": {"where": "norms|biases", "chain": ()}},
            "sgd": {"peak": 1e-3},
        },
        {
            "chain": ("partition",),
            "partition": {
                "a": {"where": "kernels", "chain": ("inside",)},
                "b": {"where": "rest", "chain": ("adam",)},
            },
            "inside": {"transform": "partition", "c": {"where": "attn", "chain": ("sgd",)}},
            "adam": {"peak": 1e-3},
            "sgd": {"peak": 1e-2},
        },
        {"chain": ("sgd", "scale_by_backtracking_linesearch"), "sgd": {"peak": 1.0}, **SEARCH},
        {"chain": ("scale_by_lbfgs", "scale", "scale_by_zoom_linesearch"), "scale": {"step_size": -1.0}, **SEARCH},
        {"chain": ("sgd", "scale_by_polyak"), "sgd": {"peak": 1.0}},
        {"chain": ("scale_by_rprop", "scale"), "scale_by_rprop": {"learning_rate": 0.1}, "scale": {"step_size": -1.0}},
        {**DEFAULT, "chain": (*DEFAULT["chain"], "scale_by_layer"), "scale_by_layer": {"decay": 0.9}},
        {**DEFAULT, "chain": (*DEFAULT["chain"], "proximal_l1", "ema_of_params"), "proximal_l1": {"l1": 1e-4}},
        {  # LAMB by hand
            "chain": (*DEFAULT["chain"][:-1], "scale_by_trust_ratio", "scale_by_learning_rate"),
            **{name: DEFAULT[name] for name in DEFAULT["chain"]},
        },
        {  # StableAdamW: its clipping is of updates
            "chain": ("scale_by_adam", "clip_by_block_rms", "scale_by_learning_rate"),
            "clip_by_block_rms": {"threshold": 1.0},
            "scale_by_learning_rate": RATE,
        },
        {  # each group by itself is sound, one after the other they are not
            "chain": ("partition",),
            "partition": {
                "a": {"where": "kernels", "chain": ("clip_by_global_norm", "adam", "decay", "fast")},
                "b": {"where": "rest", "chain": ("clip", "scale_by_adam", "slow")},
            },
            "clip_by_global_norm": {"max_norm": 1.0},
            "clip": {"max_delta": 1.0},
            "adam": {"transform": "scale_by_adam"},
            "decay": {"transform": "add_decayed_weights", "weight_decay": 0.1},
            "fast": {"transform": "scale_by_learning_rate", "peak": 1e-3},
            "slow": {"transform": "scale_by_learning_rate", "peak": 1e-4},
        },
    ],
    ids=lambda spec: "-".join(spec["chain"]),
)
def test_a_sound_spec_raises_no_doubt(spec):
    assert optim.check(spec, PARAMS, strict=True) == []


@pytest.mark.parametrize(
    ("rule", "names", "tables"),
    [
        ("no learning rate", ("scale_by_adam",), {}),
        ("no learning rate", ("scale_by_adam", "scale"), {"scale": {"step_size": 0.1}}),
        ("no learning rate", ("scale_by_adam", "sgd"), {"sgd": {"learning_rate": 0.1, "where": "kernels"}}),
        ("no learning rate", ("scale_by_adam", "proximal_l1"), {"proximal_l1": {"l1": 1e-4, "learning_rate": 1e-3}}),
        ("two learning rates", ("adam", "scale_by_learning_rate", "sgd"), {"adam": RATE, "sgd": RATE}),
        ("two changes of sign", ("adam", "scale_by_learning_rate"), {"adam": RATE}),
        ("two changes of sign", ("sgd", "scale"), {"sgd": RATE, "scale": {"step_size": -1.0}}),
        ("steps as large as the parameters", ("adafactor",), {}),
        ("decay of biases or norms", ("adafactor",), {"adafactor": {**RATE, "weight_decay_rate": 0.1}}),
        ("clipping after scaling", ("scale_by_adam", "clip_by_global_norm", "scale_by_learning_rate"), {}),
        (
            "decay of biases or norms",
            ("scale_by_adam", "add_decayed_weights", "scale_by_learning_rate"),
            {"add_decayed_weights": {"weight_decay": 0.1}},
        ),
        ("decay of biases or norms", ("adamw",), {"adamw": RATE}),
        ("decay before scaling", ("add_decayed_weights", "scale_by_adam", "scale_by_learning_rate"), {}),
        ("decay after the learning rate", ("scale_by_adam", "scale_by_learning_rate", "add_decayed_weights"), {}),
        ("Muon on embeddings", ("contrib.scale_by_muon", "scale_by_learning_rate"), {}),
        ("Muon on embeddings", ("m",), {"m": {"transform": "contrib.muon", "weight_decay": 0.0, **RATE}}),
        ("GaLore on stacked layers", ("g",), {"g": {"transform": "contrib.galore", "rank": 4, **RATE}}),
        ("schedule-free with a schedule", ("schedule_free_adamw",), {"schedule_free_adamw": RATE}),
        ("no learning rate", ("sgd",), {"sgd": {"learning_rate": 0.1, "where": "kernels"}}),
        ("no learning rate", ("scale_by_rprop",), {"scale_by_rprop": {"learning_rate": 0.1}}),
        ("scaling after the learning rate", ("scale_by_learning_rate", "scale_by_adam"), {}),
        ("cautious after the learning rate", ("scale_by_adam", "scale_by_learning_rate", "cautious"), {}),
        ("decay after the learning rate", ("sgd", "add_decayed_weights"), {"sgd": {"learning_rate": 0.1}}),
        ("a number of the wrong sign", ("sgd",), {"sgd": {"learning_rate": -0.1}}),
        ("a number of the wrong sign", ("clip_by_global_norm", "sgd"), {"sgd": RATE, **max_norm(-1)}),
        ("a number of the wrong sign", ("clip_by_global_norm", "sgd"), {"sgd": RATE, **max_norm(0.0)}),
        ("an impossible argument", ("adam",), {"adam": {"b1": 2.0, **RATE}}),
        ("an impossible argument", ("adam",), {"adam": {"b2": 1.0, **RATE}}),
        ("an impossible argument", ("adam",), {"adam": {"b2": {"schedule": "linear", "peak": -1.0}, **RATE}}),
        ("an impossible argument", ("adam",), {"adam": {"b2": True, **RATE}}),
        ("an impossible argument", ("muon",), {"muon": {"beta": 1.0, **RATE}}),
        ("an impossible argument", ("muon",), {"muon": {"adam_b1": 1.0, **RATE}}),
        ("an impossible argument", ("sgd",), {"sgd": {"momentum": 1.5, **RATE}}),
        ("an impossible argument", ("sgd", "ema_of_params"), {"sgd": RATE, "ema_of_params": {"decay": 1.0}}),
        ("an impossible argument", ("sgd", "proximal_l1"), {"sgd": RATE, "proximal_l1": {"l1": -1.0}}),
        ("an impossible argument", ("adam",), {"adam": {"eps": -1.0, **RATE}}),
        ("an impossible argument", ("adam",), {"adam": {"nesterov": "maybe", **RATE}}),
        ("an impossible argument", ("decay", "sgd"), {"decay": {**L2, "weight_decay": True}, "sgd": RATE}),
        ("an impossible argument", ("decay", "sgd"), {"decay": {**L2, "weight_decay": -0.1}, "sgd": RATE}),
        ("an impossible argument", ("clip_by_global_norm", "sgd"), {"sgd": RATE, **max_norm(True)}),
        ("an impossible argument", ("sgd",), {"sgd": {"peak": True}}),
        ("an impossible argument", ("sgd",), {"sgd": {"peak": 0.0}}),
        ("all set to zero", ("set_to_zero", "sgd"), {"sgd": RATE}),
        ("not the applied update", ("scale_by_adam", "ema_of_params", "scale_by_learning_rate"), {}),
        ("not the applied update", ("lookahead", "sgd", "ema_of_params"), {"sgd": RATE}),
        ("not the applied update", ("mechanize", "sgd", "ema_of_params"), {"sgd": RATE}),
        ("not the applied update", ("schedule_free", "sgd", "proximal_l1"), {"sgd": FLAT, "proximal_l1": {"l1": 0.1}}),
    ],
)
def test_what_is_almost_surely_wrong_is_found(rule, names, tables):
    assert found(*names, **tables) == {rule}
    with pytest.raises(ConfigError, match="optimizer stage '"):
        optim.check({"chain": names, **TABLES, **tables}, PARAMS, strict=True)


@pytest.mark.parametrize("warmup", [7, 100.0])
def test_a_warmup_beyond_the_run_is_found(warmup):
    spec = {"chain": ("sgd",), "sgd": {**RATE, "warmup": warmup}}
    assert [finding.rule for finding in optim.check(spec, steps=6)] == ["a warmup beyond the run"]
    assert optim.check(spec, steps=100) == optim.check(spec) == []
    assert optim.check({"chain": ("sgd",), "sgd": {**RATE, "warmup": 0.9}}, steps=6) == []


def test_a_users_own_transform_may_hold_the_learning_rate(module):
    module("jaxlm_test_mine", "def mine():\n    return optax.scale(-0.1)\n")
    assert found("jaxlm_test_mine:mine") == set()


@pytest.mark.parametrize(
    "transform",
    [
        optax.adamw(1e-3),
        optax.chain(optax.clip(1.0), optax.sgd(0.1)),
        optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
        optax.apply_if_finite(optax.sgd(0.1), 3),
        optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
    ],
    ids=["adamw", "chain", "inject_hyperparams", "apply_if_finite", "MultiSteps"],
)
def test_a_made_transform_may_hold_the_learning_rate(transform):
    assert found("mine", mine={"transform": transform}) == set()
    assert found("mine", mine={"transform": transform, "where": "kernels"}) == {"no learning rate"}


def test_a_partial_of_a_wrapper_is_a_stage():
    patient = functools.partial(optax.apply_if_finite, max_consecutive_errors=3)
    assert found("patient", "sgd", patient={"transform": patient}, sgd=RATE) == set()
    assert optim.explain({"chain": ("patient", "sgd"), "patient": {"transform": patient}, "sgd": RATE}, PARAMS)


def test_a_group_sees_its_part_of_the_parameters_only():
    spec = {
        "chain": ("partition",),
        "partition": {"a": {"where": "kernels", "chain": ("sgd",)}, "b": {"where": "rest", "chain": ()}},
        "sgd": {"peak": 1e-3, "where": "embeddings"},
    }
    with pytest.raises(ConfigError, match="where='embeddings' matches no parameter"):
        optim.check(spec, PARAMS)


def test_what_is_wrong_with_two_groups_is_told_of_each():
    groups = {"a": {"where": "kernels", "chain": ("scale_by_adam",)}, "b": {"where": "rest", "chain": ("trace",)}}
    spec = {"chain": ("partition",), "partition": groups, "trace": {"decay": 0.9}}
    assert {finding.stage for finding in optim.check(spec, PARAMS)} == {"scale_by_adam", "trace"}


def test_frozen_parameters_are_told():
    spec = {"chain": ("skip_nonfinite", "freeze", "sgd"), "freeze": {"where": "embeddings"}, "sgd": RATE}
    assert [way.path for way in ways(stages(spec), PARAMS) if way.frozen] == ["wte/embedding"]
    assert optim.explain(spec, PARAMS)["wte/embedding"].multiplier == 0


def test_what_is_set_to_zero_has_no_rate():
    spec = {"chain": ("set_to_zero", "sgd"), "set_to_zero": {"where": "embeddings"}, "sgd": RATE}
    told = optim.explain(spec, PARAMS)
    assert {path for path, touched in told.items() if touched.multiplier == 0} == {"wte/embedding"}


@pytest.mark.parametrize("where", ["all", "h/|ln_f|wte|wpe"])
def test_a_freeze_of_everything_says_so(where):
    with pytest.raises(ConfigError, match="matches all parameters and leaves nothing to train"):
        optim.check({"chain": ("freeze", "sgd"), "freeze": {"where": where}, "sgd": RATE}, PARAMS)


def test_a_look_at_a_spec_takes_no_model():
    assert optim.check({"chain": ("scale_by_cocob",)}) == []
    assert [finding.rule for finding in optim.check({"chain": ("scale_by_lion",)})] == ["no learning rate"]
    model = gpt2.shapes(resolved().model)
    assert tree.paths(review.PARAMS) == tree.paths(model)
    assert [x.ndim for x in jax.tree.leaves(review.PARAMS)] == [x.ndim for x in jax.tree.leaves(model)]


def test_groups_with_a_learning_rate_each_are_no_two_rates():
    groups = {"a": {"where": "kernels", "chain": ("sgd",)}, "b": {"where": "rest", "chain": ("adam",)}}
    assert found("partition", partition=groups, sgd={"learning_rate": 0.1}, adam={"learning_rate": 0.1}) == set()


def test_muon_decays_kernels_and_its_adam_the_tables():
    spec = {"chain": ("muon",), "muon": {"peak": 1e-3, "weight_decay": 0.1, "adam_weight_decay": 0.2}}
    model = gpt2.shapes(resolved().model)
    decays = {path: touched.decay for path, touched in optim.explain(spec, model).items()}
    assert decays["h/attn/c_attn/kernel"] == 0.1 and decays["wte/embedding"] == 0.2
    assert decays["h/attn/c_attn/bias"] == decays["ln_f/scale"] == 0


def test_what_is_wrong_within_a_group_is_found():
    groups = {"a": {"where": "kernels", "chain": ("scale_by_adam", "clip", "sgd")}, "b": {"where": "rest", "chain": ()}}
    rules = found("partition", partition=groups, clip={"max_delta": 1.0}, sgd={"learning_rate": 0.1})
    assert rules == {"clipping after scaling"}


def test_clipping_before_freezing_counts_what_does_not_move():
    freeze, last = {"freeze": {"where": "embeddings"}}, {"train_last_layers": {"count": 1}}
    clip, rest = "clip_by_global_norm", ("scale_by_adam", "scale_by_learning_rate")
    assert found(clip, "freeze", *rest, **freeze) == {"clipping of frozen gradients"}
    assert found(clip, "train_last_layers", *rest, **last) == {"clipping of frozen gradients"}
    zero = {"set_to_zero": {"where": "embeddings"}}
    assert found(clip, "set_to_zero", *rest, **zero) == {"clipping of frozen gradients"}
    assert not found("set_to_zero", clip, *rest, **zero)
    for names in (("freeze", clip), ("freeze", "train_last_layers", clip)):
        assert not found(*names, *rest, **freeze, **last if len(names) > 2 else {})
