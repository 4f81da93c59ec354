import re

import jax.numpy as jnp
import optax
import optax.contrib
import pytest

from jaxlm import config
from jaxlm.errors import ConfigError
from jaxlm.optim import chain, transforms
from jaxlm.optim.stages import stages


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"chain": ()}, "optimizer.chain is empty"),
        (
            {"chain": ("clip_by_global_nrom",)},
            "unknown optimizer transform 'clip_by_global_nrom': did you mean 'clip_by_global_norm'",
        ),
        ({"chain": ("contrib.muno",)}, "unknown optimizer transform 'muno': did you mean 'muon'"),
        ({"chain": ("scale", "scale"), "scale": {"step_size": 1.0}}, "optimizer.chain has 'scale' twice"),
        (
            {"chain": ("scale_by_adam",), "scale_by_adam": {"b3": 0.9}},
            "'scale_by_adam' takes no argument 'b3': known: b1, b2",
        ),
        ({"chain": ("scale_by_adam",), "scale_by_adam": {"esp": 0.9}}, "no argument 'esp': did you mean 'eps'"),
        ({"chain": ("scale_by_adam",), "scale_by_adam": {"wehre": "all"}}, "no argument 'wehre': did you mean 'where'"),
        ({"chain": ("scale_by_adam",), "scale_by_adam": {"peak": 0.9}}, "'scale_by_adam' takes no argument 'peak': "),
        ({"chain": ("adamw",), "adamw": {"peak": 0.9, "wramup": 0.9}}, "no argument 'wramup': did you mean 'warmup'"),
        (
            {"chain": ("scale_by_learning_rate",), "scale_by_learning_rate": {"peak": 1.0, "fianl": 0.1}},
            "no argument 'fianl': did you mean 'final'",
        ),
        (
            {"chain": ("lookahead", "sgd"), "lookahead": {"where": "kernels"}, "sgd": {"learning_rate": 0.1}},
            "optimizer.lookahead.where='kernels': a wrapper holds all stages after it",
        ),
        (
            {"chain": ("adamw",), "adamw": {"peak": 1e-3, "learning_rate": 0.5}},
            "optimizer.adamw has a 'learning_rate' and a 'peak'",
        ),
        ({"chain": ("scale",)}, "lacks its argument 'step_size': set optimizer.scale.step_size"),
        (
            {"chain": ("scale_by_learning_rate",)},
            "lacks its argument 'peak': set optimizer.scale_by_learning_rate.peak",
        ),
        ({"chain": ("adamw",), "adamw": {"schedule": "constant"}}, "lacks its argument 'peak'"),
        ({"chain": ("adamw",)}, "lacks its argument 'learning_rate': set optimizer.adamw.learning_rate"),
        (
            {"chain": ("contrib.muon",)},
            "name the stage freely and give it a table with 'learning_rate' and 'transform'",
        ),
        (
            {"chain": ("adamw",), "adamw": {"peak": 1.0, "schedule": "warmup_cosin"}},
            "unknown schedule 'warmup_cosin': did you mean 'warmup_cosine'",
        ),
        ({"chain": ("scale",), "scale": {"step_size": 1.0, "where": "("}}, "where='(' is neither one of"),
        ({"chain": ("jaxlm_test_absent:f",)}, "importing 'jaxlm_test_absent' failed: ModuleNotFoundError"),
        ({"chain": ("scale",), "scale": {"step_size": config.TRACED}}, "optimizer.scale.step_size is marked as traced"),
    ],
)
def test_a_bad_spec_is_refused(spec, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        stages(spec)


def test_ours_come_before_optaxs():
    (stage,) = stages({"chain": ("scale_by_learning_rate",), "scale_by_learning_rate": {"peak": 1.0}})
    assert stage.function is transforms.scale_by_learning_rate


def test_contrib_is_named_or_found_last():
    for name in ("ademamix", "contrib.ademamix"):
        (stage,) = stages({"chain": ("m",), "m": {"transform": name, "learning_rate": 0.1}})
        assert stage.function is optax.contrib.ademamix


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"chain": ("partition",)}, "optimizer.partition has no groups"),
        ({"chain": ("partition",), "partition": {"a": 3}}, "optimizer.partition.a is 3; expected {'where'"),
        (
            {"chain": ("partition",), "partition": {"a": {"where": "all", "chain": 5}}},
            "optimizer.partition.a.chain is 5; expected names of stages",
        ),
        ({"chain": ("partition",), "partition": {"a": {"where": "all"}}}, "optimizer.partition.a is {'where': 'all'}"),
        (
            {"chain": ("scale",), "scale": {"step_size": {"schedule": "warmup_linear"}}},
            "optimizer.scale.step_size follows a schedule and lacks its 'peak'",
        ),
        (
            {"chain": ("scale",), "scale": {"step_size": {"schedule": "warmup_linear", "peak": 1.0, "wamup": 2.0}}},
            "optimizer.scale.step_size takes no 'wamup': did you mean 'warmup'",
        ),
        (
            {"chain": ("x",), "x": {"transform": optax.MultiSteps(optax.sgd(0.1), 2)}},
            "expected the name of a function, or a transform; give its .gradient_transformation()",
        ),
        (
            {"chain": ("x", "sgd"), "x": {"transform": lambda base: base}},
            "set optimizer.x.base; or if it is to be given the stages after it, call it 'inner'",
        ),
        ({"chain": ("x",), "x": {"transform": 3}}, "optimizer.x.transform is 3; expected the name of a function"),
        ({"chain": ("x",), "x": {"transform": "<function f>"}}, "was a Python object, <function f>, which JSON can't"),
    ],
)
def test_a_bad_table_is_refused(spec, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        stages(spec)


def test_a_partition_that_names_itself_is_refused():
    spec = {"chain": ("partition",), "partition": {"a": {"where": "all", "chain": ("partition",)}}}
    with pytest.raises(ConfigError, match="its chain names itself"):
        stages(spec)


def test_a_stage_of_two_groups_is_refused():
    group = {"where": "all", "chain": ("zero_nans",)}
    with pytest.raises(ConfigError, match="has 'zero_nans' twice"):
        stages({"chain": ("partition",), "partition": {"a": group, "b": group}})


def test_a_learning_rate_that_a_transform_has_by_itself_is_its_rate():
    spec = {"chain": ("contrib.prodigy",)}
    assert chain.learning_rates(spec, None, 10, jnp.int32(0)) == {"contrib.prodigy": 1.0}
    assert chain.learning_rates({"chain": ("adafactor",)}, None, 10, jnp.int32(0)) == {}


def test_a_config_is_no_spec():
    with pytest.raises(ConfigError, match="a spec without a chain; expected a config's optimizer section"):
        stages(config.default())
