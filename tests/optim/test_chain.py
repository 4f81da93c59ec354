import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from jaxlm import config, tree
from jaxlm.errors import ConfigError
from jaxlm.optim import chain, schedules, transforms

STEPS = 40
DEFAULT = config.default().optimizer.to_dict()
KERNELS = {
    "h": {"attn": {"kernel": True, "bias": False}, "ln_1": {"scale": False, "bias": False}},
    "wte": {"embedding": False},
}


def tensors(seed, scale=1.0):
    """A tree of arrays named like the parameters of a one-layer GPT-2."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)

    return {
        "h": {
            "attn": {"kernel": draw(1, 4, 6), "bias": draw(1, 6)},
            "ln_1": {"scale": draw(1, 4), "bias": draw(1, 4)},
        },
        "wte": {"embedding": draw(7, 4)},
    }


PARAMS = tensors(0)
GRADIENTS = [tensors(seed, scale=seed / 4) for seed in range(1, 11)]  # norms on both sides of the clip


def run(make, numbers):
    """Parameters after each of 10 steps of the transformation that `make` builds from traced numbers."""

    @jax.jit
    def step(numbers, params, state, gradients):
        updates, state = make(numbers).update(gradients, state, params, value=jnp.float32(0))
        return optax.apply_updates(params, updates), state

    params, state, out = PARAMS, jax.jit(lambda numbers: make(numbers).init(PARAMS))(numbers), []
    for gradients in GRADIENTS:
        params, state = step(numbers, params, state, gradients)
        out.append(params)
    return out


def split(spec):
    """The optimizer part of `config.split`: a spec with marks, and its numbers."""
    cfg = config.default()
    with cfg.unlocked(), cfg.ignore_type():
        cfg.optimizer = spec
    structure, hparams = config.split(config.resolve(cfg))
    return structure.optimizer.to_dict(), hparams.optimizer


def update(spec, gradients=None, steps=STEPS):
    """The first update of a spec that holds its numbers."""
    transform = chain.build(spec, None, steps)
    return transform.update(gradients or GRADIENTS[0], transform.init(PARAMS), PARAMS, value=jnp.float32(0))[0]


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, rtol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-7), a, b)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of the user's own; each under a name of its own, since imports are kept."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, source):
        (tmp_path / f"{name}.py").write_text("import jax.numpy as jnp\nimport optax\n\n\n" + source)

    return write


# what is built


def test_the_default_chain_is_optaxs_to_the_bit():
    spec, numbers = split(DEFAULT)

    def by_hand(numbers):
        clip, adam, decay, rate = (numbers[stage] for stage in DEFAULT["chain"])
        shape = schedules.warmup_cosine(STEPS, warmup=rate["warmup"], final=rate["final"])
        return optax.chain(
            optax.clip_by_global_norm(clip["max_norm"]),
            optax.scale_by_adam(b1=adam["b1"], b2=adam["b2"], eps=adam["eps"]),
            optax.masked(optax.add_decayed_weights(decay["weight_decay"]), KERNELS),
            optax.scale_by_schedule(lambda count: -(rate["peak"] * shape(count))),
        )

    assert_same_bits(run(lambda numbers: chain.build(spec, numbers, STEPS), numbers), run(by_hand, numbers))


def test_the_default_chain_is_adamw_with_constants():
    spec, numbers = split({**DEFAULT, "scale_by_learning_rate": {**DEFAULT["scale_by_learning_rate"], "warmup": 4.0}})
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 4, STEPS, 1e-4)

    def constants(_):
        adamw = optax.adamw(rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=KERNELS)
        return optax.with_extra_args_support(optax.chain(optax.clip_by_global_norm(1.0), adamw))

    assert_close(run(lambda numbers: chain.build(spec, numbers, STEPS), numbers), run(constants, numbers))


def test_one_compilation_serves_any_numbers():
    spec, numbers = split(DEFAULT)
    traces = []

    @jax.jit
    def update(numbers):
        traces.append(1)
        transform = chain.build(spec, numbers, STEPS)
        return transform.update(GRADIENTS[0], transform.init(PARAMS), PARAMS)[0]

    for i in range(5):
        update(jax.tree.map(lambda number, i=i: np.float32(number * 0.9**i), numbers))
    assert len(traces) == 1


def test_stages_apply_in_their_order():
    tables = {"scale": {"step_size": 3.0}, "clip_by_global_norm": {"max_norm": 1.0}}
    last, first = (
        tree.norm(update({"chain": order, **tables}))
        for order in (("scale", "clip_by_global_norm"), ("clip_by_global_norm", "scale"))
    )
    np.testing.assert_allclose([last, first], [1.0, 3.0], rtol=1e-5)


def test_a_stage_without_a_table_uses_its_functions_defaults():
    assert_same_bits(
        update({"chain": ("scale_by_lion",)}), update({"chain": ("scale_by_lion",), "scale_by_lion": {"b1": 0.9}})
    )


def test_a_stage_may_be_named_freely():
    by_name = update({"chain": ("scale",), "scale": {"step_size": 0.5}})
    assert_same_bits(update({"chain": ("half",), "half": {"transform": "scale", "step_size": 0.5}}), by_name)


def test_a_transform_may_be_there_twice_under_two_names():
    half = {"transform": "scale", "step_size": 0.5}
    quarter = update({"chain": ("scale",), "scale": {"step_size": 0.25}})
    assert_same_bits(update({"chain": ("a", "b"), "a": half, "b": half}), quarter)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "contrib.muon", "muon", "contrib.ademamix"])
def test_aliases_take_a_peak_and_a_schedule(name):
    table = {"transform": name, "peak": 0.1, "schedule": "warmup_linear", "warmup": 2.0, "final": 0.0}
    spec, numbers = split({"chain": ("all_in_one",), "all_in_one": table})
    assert numbers["all_in_one"].keys() == {"peak", "warmup", "final"}
    after = run(lambda numbers: chain.build(spec, numbers, 10), numbers)
    assert_same_bits(after[0], PARAMS)  # the warmup begins at 0
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.any(a != b)), after[1], PARAMS)))


def test_an_alias_with_a_schedule_is_optaxs():
    table = {"peak": 0.1, "schedule": "warmup_linear", "warmup": 2, "final": 0.5, "weight_decay": 0.3}
    rate = optax.join_schedules([optax.linear_schedule(0.0, 0.1, 2), optax.linear_schedule(0.1, 0.05, 8)], [2])
    ours = run(lambda _: chain.build({"chain": ("adamw",), "adamw": table}, None, 10), None)
    assert_close(ours, run(lambda _: optax.adamw(rate, weight_decay=0.3), None))


def test_an_alias_takes_a_plain_learning_rate():
    ours = update({"chain": ("sgd",), "sgd": {"learning_rate": 0.5}})
    assert_same_bits(ours, jax.tree.map(lambda g: -0.5 * g, GRADIENTS[0]))


def test_a_transform_of_the_users_own(module):
    module("jaxlm_test_flip", "def flip(factor, steps):\n    return optax.scale(-factor * steps)\n")
    spec, numbers = split({"chain": ("flip",), "flip": {"transform": "jaxlm_test_flip:flip", "factor": 0.5}})
    assert numbers == {"flip": {"factor": np.float32(0.5)}}
    out = chain.build(spec, numbers, 3).update(GRADIENTS[0], chain.build(spec, numbers, 3).init(PARAMS), PARAMS)[0]
    assert_same_bits(out, jax.tree.map(lambda g: -1.5 * g, GRADIENTS[0]))


def test_a_transform_may_take_a_table_in_its_table(module):
    module(
        "jaxlm_test_groups",
        "def groups(rates):\n    return optax.scale(rates['norms'] * (2 if rates['kind'] == 'fast' else 1))\n",
    )
    table = {"transform": "jaxlm_test_groups:groups", "rates": {"norms": 0.25, "kind": "fast"}}
    spec, numbers = split({"chain": ("groups",), "groups": table})
    assert numbers == {"groups": {"rates": {"norms": np.float32(0.25)}}}
    transform = chain.build(spec, numbers, STEPS)
    out = transform.update(GRADIENTS[0], transform.init(PARAMS), PARAMS)[0]
    assert_same_bits(out, jax.tree.map(lambda g: 0.5 * g, GRADIENTS[0]))


# where


@pytest.mark.parametrize("where", ["kernels", "embeddings", "attn/", "all"])
def test_a_stage_changes_nothing_outside_its_mask_and_explain_agrees(where):
    spec = {"chain": ("add_decayed_weights",), "add_decayed_weights": {"weight_decay": 0.5, "where": where}}
    changed = jax.tree.map(lambda u, g: bool(jnp.any(u != g)), update(spec), GRADIENTS[0])
    assert changed == tree.mask(PARAMS, where)
    explained = chain.explain(spec, jax.eval_shape(lambda: PARAMS))
    assert [bool(names) for names in explained.values()] == jax.tree.leaves(changed)
    assert list(explained) == tree.paths(PARAMS)


def test_decay_is_of_kernels_by_default():
    explained = chain.explain(DEFAULT, PARAMS)
    assert explained["h/attn/kernel"] == DEFAULT["chain"]
    others = tuple(name for name in DEFAULT["chain"] if name != "add_decayed_weights")
    assert {explained[path] for path in tree.paths(PARAMS) if path != "h/attn/kernel"} == {others}


def test_a_masked_stage_with_state_keeps_it_for_its_own_parameters_only():
    state = chain.build({"chain": ("scale_by_adam",), "scale_by_adam": {"where": "embeddings"}}, None, STEPS).init(
        PARAMS
    )
    shapes = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert shapes == [(7, 4), (7, 4)]


def test_a_mask_that_matches_nothing_is_an_error():
    with pytest.raises(ConfigError, match="'^kernel' matches no parameter".replace("^", r"\^")):
        update({"chain": ("scale",), "scale": {"step_size": 1.0, "where": "^kernel"}})
    with pytest.raises(ConfigError, match="matches no parameter"):
        chain.explain({"chain": ("scale",), "scale": {"step_size": 1.0, "where": "^kernel"}}, PARAMS)


# the learning rate


@pytest.mark.parametrize("stage", ["scale_by_learning_rate", "adamw"])
def test_the_learning_rate_is_the_scheduled_one(stage):
    table = {"peak": 0.5, "schedule": "warmup_linear", "warmup": 4.0, "final": 0.0}
    spec = {"chain": ("clip_by_global_norm", stage), "clip_by_global_norm": {"max_norm": 1.0}, stage: table}
    rates = [float(chain.learning_rate(spec, None, 12, jnp.int32(count))) for count in (0, 2, 4, 8, 12)]
    np.testing.assert_allclose(rates, [0, 0.25, 0.5, 0.25, 0], atol=1e-7)


def test_the_learning_rate_follows_traced_numbers():
    spec, numbers = split(DEFAULT)
    numbers["scale_by_learning_rate"] = {"peak": 8.0, "warmup": 0.5, "final": 1.0}
    assert jax.jit(lambda n: chain.learning_rate(spec, n, 8, jnp.int32(2)))(numbers) == 4.0


def test_a_plain_learning_rate_is_itself():
    spec = {"chain": ("sgd",), "sgd": {"learning_rate": 0.25}}
    assert chain.learning_rate(spec, None, STEPS, jnp.int32(3)) == 0.25


def test_a_chain_without_a_learning_rate_has_none():
    assert chain.learning_rate({"chain": ("scale_by_adam",)}, None, STEPS, jnp.int32(3)) is None


def test_a_peak_of_the_users_own_meaning_is_no_learning_rate(module):
    module("jaxlm_test_peak", "def own(peak, sharpness):\n    return optax.scale(peak * sharpness)\n")
    spec = {"chain": ("own",), "own": {"transform": "jaxlm_test_peak:own", "peak": 1.0, "sharpness": 2.0}}
    assert chain.learning_rate(spec, None, STEPS, jnp.int32(3)) is None


# static arguments


def test_the_default_chain_takes_all_its_numbers_traced():
    assert chain.static_arguments(DEFAULT, PARAMS, STEPS) == frozenset()


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "contrib.ademamix"])
def test_aliases_take_all_their_numbers_traced(name):
    table = {"transform": name, "peak": 0.1, "weight_decay": 0.1}
    assert chain.static_arguments({"chain": ("all_in_one",), "all_in_one": table}, PARAMS, STEPS) == frozenset()


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
    assert chain.static_arguments(spec, PARAMS, STEPS) == static


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
    static = chain.static_arguments(cfg.optimizer.to_dict(), PARAMS, STEPS)
    structure, hparams = config.split(cfg, static)
    after = run(lambda numbers: chain.build(structure.optimizer.to_dict(), numbers, STEPS), hparams.optimizer)
    assert_close(after[0], jax.tree.map(lambda p, g: p + 2 * g, PARAMS, GRADIENTS[0]))


def test_a_chain_that_fails_with_constants_is_an_error(module):
    module("jaxlm_test_fails", "def fails(x):\n    return optax.stateless(lambda u, p: u['nothing'])\n")
    with pytest.raises(ConfigError, match="the optimizer can't be built: 'nothing'"):
        chain.static_arguments({"chain": ("f",), "f": {"transform": "jaxlm_test_fails:fails", "x": 1.0}}, PARAMS, STEPS)


# errors


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
        chain.stages(spec)


def test_a_function_that_makes_no_transform_is_refused(module):
    module("jaxlm_test_none", "def nothing(x):\n    return x\n")
    spec = {"chain": ("nothing",), "nothing": {"transform": "jaxlm_test_none:nothing", "x": 1.0}}
    with pytest.raises(ConfigError, match="optimizer stage 'nothing' is no transform: it returned float"):
        chain.build(spec, None, STEPS)


def test_a_functions_own_complaint_is_kept(module):
    module("jaxlm_test_complains", "def complains():\n    raise ValueError('not on a Sunday')\n")
    with pytest.raises(ConfigError, match="optimizer stage 'jaxlm_test_complains:complains': not on a Sunday"):
        chain.build({"chain": ("jaxlm_test_complains:complains",)}, None, STEPS)


def test_ours_come_before_optaxs():
    (stage,) = chain.stages({"chain": ("scale_by_learning_rate",), "scale_by_learning_rate": {"peak": 1.0}})
    assert stage.function is transforms.scale_by_learning_rate


def test_contrib_is_named_or_found_last():
    table = {"learning_rate": 0.1}
    for name in ("muon", "contrib.muon"):
        (stage,) = chain.stages({"chain": ("m",), "m": {"transform": name, **table}})
        assert stage.function is optax.contrib.muon
