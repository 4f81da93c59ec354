import functools

import optax
import optax.contrib
import pytest

from jaxlm import config
from jaxlm.errors import ConfigError
from jaxlm.optim import edits, review, transforms
from tests.optim.small import DEFAULT, GROUPS, assert_same_bits, update


def test_a_function_or_a_transform_may_stand_in_a_spec():
    half = edits.replace(DEFAULT, "scale_by_adam", "mine", transform=optax.scale(0.5))
    also = edits.replace(DEFAULT, "scale_by_adam", "mine", transform=optax.scale, step_size=0.5)
    named = edits.replace(DEFAULT, "scale_by_adam", "mine", transform="scale", step_size=0.5)
    assert_same_bits(update(half), update(named))
    assert_same_bits(update(also), update(named))
    with pytest.raises(ConfigError, match="an optimizer stage is a Python object"):
        edits.to_json(half)


def test_edits_give_new_specs_and_leave_the_old_one_alone():
    before = edits.to_json(DEFAULT)
    lion = edits.replace(DEFAULT, "scale_by_adam", "scale_by_lion", b1=0.9)
    assert lion["chain"] == ("clip_by_global_norm", "scale_by_lion", "add_decayed_weights", "scale_by_learning_rate")
    assert lion["scale_by_lion"] == {"b1": 0.9} and "scale_by_adam" not in lion
    first = edits.insert_before(DEFAULT, "scale_by_adam", "scale", step_size=2.0)
    assert first["chain"][1:3] == ("scale", "scale_by_adam") and first["scale"] == {"step_size": 2.0}
    after = edits.insert_after(DEFAULT, "scale_by_adam", "scale", step_size=2.0)
    assert after["chain"][1:3] == ("scale_by_adam", "scale")
    assert edits.drop(DEFAULT, "clip_by_global_norm")["chain"] == DEFAULT["chain"][1:]
    warm = edits.with_args(DEFAULT, "scale_by_adam", b1=0.8)
    assert warm["scale_by_adam"] == {**DEFAULT["scale_by_adam"], "b1": 0.8}
    assert edits.to_json(DEFAULT) == before


def test_replacing_and_putting_back_is_the_same_spec():
    lion = edits.replace(DEFAULT, "scale_by_adam", "scale_by_lion")
    assert edits.replace(lion, "scale_by_lion", "scale_by_adam", **DEFAULT["scale_by_adam"]) == DEFAULT
    assert edits.drop(edits.insert_after(DEFAULT, "scale_by_adam", "zero_nans"), "zero_nans") == DEFAULT


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda spec: edits.drop(spec, "scale_by_adma"), "no stage 'scale_by_adma' in optimizer.chain: did you mean"),
        (lambda spec: edits.replace(spec, "scale_by_adam", "scale_by_lino"), "did you mean 'scale_by_lion'"),
        (lambda spec: edits.insert_after(spec, "scale_by_adam", "scale_by_adam"), "is in optimizer.chain already"),
        (lambda spec: edits.with_args(spec, "scale_by_adam", beta=0.1), "takes no argument 'beta'"),
        (lambda spec: edits.insert_after(spec, "scale_by_adam", "scale"), "lacks its argument 'step_size'"),
    ],
)
def test_an_edit_that_makes_no_spec_is_refused(edit, said):
    with pytest.raises(ConfigError, match=said):
        edit(DEFAULT)


def test_leave_one_out_leaves_the_learning_rate():
    arms = review.leave_one_out(DEFAULT)
    assert list(arms) == ["without clip_by_global_norm", "without scale_by_adam", "without add_decayed_weights"]
    for name, overrides in arms.items():
        left = set(DEFAULT["chain"]) - set(overrides["optimizer"]["chain"])
        assert left == {name.removeprefix("without ")}


def test_a_partition_goes_with_the_tables_of_its_stages():
    spec = edits.insert_before(GROUPS, "partition", "zero_nans")
    assert edits.replace(spec, "partition", "adamw", peak=0.1) == {
        "chain": ("zero_nans", "adamw"),
        "adamw": {"peak": 0.1},
    }
    assert edits.drop(spec, "partition") == {"chain": ("zero_nans",)}
    one = {"all": {"where": "all", "chain": ("sgd",)}}
    assert edits.replace(spec, "partition", "one", transform="partition", **one)["sgd"] == GROUPS["sgd"]


def test_leave_one_out_leaves_a_learning_rate_that_python_made():
    chain = ("clip_by_global_norm", "scale_by_adam", "down")
    spec = {**DEFAULT, "chain": chain, "down": {"transform": optax.scale(-1e-3)}}
    assert list(review.leave_one_out(spec)) == ["without clip_by_global_norm", "without scale_by_adam"]


def test_a_stage_in_a_group_is_edited_where_it_stands():
    adam = edits.replace(GROUPS, "scale_by_lion", "scale_by_adam", b1=0.8)
    assert adam["partition"]["others"]["chain"] == ("scale_by_adam", "rate") and adam["scale_by_adam"] == {"b1": 0.8}
    assert edits.with_args(GROUPS, "sgd", learning_rate=0.1)["sgd"] == {"learning_rate": 0.1}
    assert edits.replace(adam, "scale_by_adam", "scale_by_lion") == {**GROUPS}
    both = edits.insert_before(edits.insert_after(GROUPS, "scale_by_lion", "zero_nans"), "sgd", "clip", max_delta=1.0)
    assert both["partition"]["others"]["chain"] == ("scale_by_lion", "zero_nans", "rate")
    assert both["partition"]["matrices"]["chain"] == ("clip", "sgd")
    with pytest.raises(ConfigError, match="'sgd' is in optimizer.chain already"):
        edits.replace(GROUPS, "scale_by_lion", "sgd", learning_rate=0.1)
    with pytest.raises(ConfigError, match="no stage 'scale_by_loin' in optimizer.chain: did you mean 'scale_by_lion'"):
        edits.drop(GROUPS, "scale_by_loin")


def test_a_whole_config_is_no_spec():
    with pytest.raises(ConfigError, match="expected a config's optimizer section, cfg.optimizer.to_dict"):
        edits.drop(config.default(), "scale_by_adam")


def test_leave_one_out_goes_into_the_groups_of_a_partition_that_sets_learning_rates():
    arms = review.leave_one_out(edits.insert_before(GROUPS, "partition", "zero_nans"))
    assert list(arms) == ["without zero_nans", "without scale_by_lion"]


def test_no_group_is_frozen_by_a_drop():
    with pytest.raises(ConfigError, match="'sgd' is the only stage of its chain"):
        edits.drop(GROUPS, "sgd")


def test_a_function_is_named_where_its_name_means_it():
    for function in (optax.contrib.scale_by_ademamix, transforms.cautious, optax.scale_by_lion):
        spec = edits.replace(DEFAULT, "scale_by_adam", function)
        assert edits.from_json(edits.to_json(spec)) == spec
    optax_s = edits.replace(DEFAULT, "clip_by_global_norm", optax.clip_by_global_norm, max_norm=1.0)
    with pytest.raises(ConfigError, match="is a Python object"):  # the name means jaxlm's own
        edits.to_json(optax_s)


@pytest.mark.parametrize("spec", [DEFAULT, GROUPS], ids=["default", "partition"])
def test_json_gives_a_spec_back_equal(spec):
    assert edits.from_json(edits.to_json(spec)) == spec


def test_a_diff_names_what_differs():
    assert edits.diff(DEFAULT, DEFAULT) == ""
    lion = edits.replace(DEFAULT, "scale_by_adam", "scale_by_lion", b1=0.9)
    changed = [line for line in edits.diff(DEFAULT, lion).splitlines() if line[0] in "+-"]
    assert changed == ["- scale_by_adam(b1=0.9, b2=0.95, eps=1e-08)", "+ scale_by_lion(b1=0.9)"]
    assert "matrices, where='kernels'" in edits.diff(DEFAULT, GROUPS)


@pytest.mark.parametrize("make", [lambda: lambda: optax.scale(0.5), lambda: optax.scale(0.5)])
def test_a_diff_tells_two_python_objects_apart(make):
    a, b = (edits.insert_after(DEFAULT, "scale_by_adam", "mine", transform=transform) for transform in (make(), make()))
    assert edits.diff(a, dict(a)) == ""
    assert [line[:7] for line in edits.diff(a, b).splitlines() if line[0] in "+-"] == ["- mine:", "+ mine:"]
    assert "mine: Python()" in edits.lines(a)


def test_a_function_of_optax_is_a_stage_by_its_name():
    assert edits.replace(DEFAULT, "scale_by_adam", optax.scale_by_lion, b1=0.9) == edits.replace(
        DEFAULT, "scale_by_adam", "scale_by_lion", b1=0.9
    )


def test_a_function_of_ones_own_is_a_stage_with_it():
    def mine(size):
        return optax.scale(size)

    for edit, place in ((edits.insert_before, 1), (edits.insert_after, 2)):
        spec = edit(DEFAULT, "scale_by_adam", mine, size=0.5)
        assert spec["chain"][place] == "mine" and spec["mine"] == {"transform": mine, "size": 0.5}


def test_optaxs_own_is_meant_where_ours_has_its_name():
    spec = edits.replace(DEFAULT, "clip_by_global_norm", optax.clip_by_global_norm, max_norm=1.0)
    assert spec["clip_by_global_norm"] == {"transform": optax.clip_by_global_norm, "max_norm": 1.0}


@pytest.mark.parametrize("new", [optax.scale(0.5), lambda: optax.scale(0.5), functools.partial(optax.scale, 0.5)])
def test_what_has_no_name_needs_one(new):
    with pytest.raises(ConfigError, match=r"has no name for its stage; give one: replace\(spec, stage, 'mine', tr"):
        edits.replace(DEFAULT, "scale_by_adam", new)


@pytest.mark.parametrize("text", ["{", "", "chain"])
def test_what_is_no_json_is_no_spec(text):
    with pytest.raises(ConfigError, match="not a spec"):
        edits.from_json(text)
