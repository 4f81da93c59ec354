import jax
import pytest

from jaxlm import config
from jaxlm.errors import ConfigError
from jaxlm.optim import chain
from jaxlm.optim.static import static_arguments
from tests.optim.small import DEFAULT, GRADIENTS, PARAMS, STEPS, assert_close, run


def test_the_default_chain_takes_all_its_numbers_traced():
    assert static_arguments(DEFAULT, PARAMS, STEPS) == frozenset()


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "contrib.ademamix"])
def test_aliases_take_all_their_numbers_traced(name):
    table = {"transform": name, "peak": 0.1, "weight_decay": 0.1}
    assert static_arguments({"chain": ("all_in_one",), "all_in_one": table}, PARAMS, STEPS) == frozenset()


def test_a_number_that_its_function_refuses_is_refused_before_anything_is_traced():
    late = {**DEFAULT["scale_by_learning_rate"], "final": 1.5}
    with pytest.raises(ConfigError, match="final is 1.5; expected from 0 to 1"):
        static_arguments({**DEFAULT, "scale_by_learning_rate": late}, PARAMS, STEPS)


PICKY = """
def picky(strength, threshold, rates=None):
    if threshold > 0.5:  # Python control flow: a traced number has no truth
        strength = 2 * strength
    if rates is not None and rates["inner"] > 0:
        strength = 2 * strength
    return optax.scale(strength)
"""


@pytest.mark.parametrize(
    ("table", "static"),
    [({}, {"picky.threshold"}), ({"rates": {"inner": 0.5}}, {"picky.threshold", "picky.rates.inner"})],
)
def test_a_number_in_pythons_control_flow_is_static(module, table, static):
    module("jaxlm_test_picky", PICKY)
    picky = {"transform": "jaxlm_test_picky:picky", "strength": 1.0, "threshold": 0.75, **table}
    spec = {**DEFAULT, "chain": ("picky", *DEFAULT["chain"]), "picky": picky}
    assert static_arguments(spec, PARAMS, STEPS) == static


def test_a_static_number_still_builds_under_jit(module):
    module("jaxlm_test_picky2", PICKY)
    cfg = config.override(
        config.default(),
        {
            "optimizer.chain": "picky",
            "optimizer.picky": {"transform": "jaxlm_test_picky2:picky", "strength": 1.0, "threshold": 0.75},
        },
    )
    cfg = config.resolve(cfg)
    static = static_arguments(cfg.optimizer.to_dict(), PARAMS, STEPS)
    structure, hparams = config.split(cfg, static)
    after = run(lambda numbers: chain.build(structure.optimizer.to_dict(), numbers, STEPS), hparams.optimizer)
    assert_close(after[0], jax.tree.map(lambda p, g: p + 2 * g, PARAMS, GRADIENTS[0]))


def test_a_chain_that_fails_with_constants_is_an_error(module):
    module("jaxlm_test_fails", "def fails(x):\n    return optax.stateless(lambda u, p: u['nothing'])\n")
    with pytest.raises(ConfigError, match="can't be built: optimizer stage 'f' raised KeyError: 'nothing'"):
        static_arguments({"chain": ("f",), "f": {"transform": "jaxlm_test_fails:fails", "x": 1.0}}, PARAMS, STEPS)


def test_text_in_the_place_of_a_number_is_named():
    spec = {
        "chain": ("decay", "scale_by_learning_rate"),
        "decay": {"transform": "add_decayed_weights", "weight_decay": 0.1, "where": "all"},
        "scale_by_learning_rate": {"peak": "1e-3x", "schedule": "linear"},
    }
    with pytest.raises(ConfigError, match="optimizer.scale_by_learning_rate.peak is '1e-3x'; expected a number"):
        static_arguments(spec, PARAMS, STEPS)


@pytest.mark.parametrize("value", [None, (0.1, 0.2), "much"])
def test_what_is_no_number_in_the_place_of_one_is_named(value):
    spec = {
        "chain": ("clip_by_global_norm", "scale_by_adam", "scale_by_learning_rate"),
        "clip_by_global_norm": {"max_norm": value},
        "scale_by_adam": {"b1": 0.9, "mu_dtype": None},
        "scale_by_learning_rate": {"peak": 1e-3},
    }
    with pytest.raises(ConfigError, match=r"^optimizer.clip_by_global_norm.max_norm is .*; expected a number$"):
        static_arguments(spec, PARAMS, STEPS)
