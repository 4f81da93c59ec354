import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from jaxlm import optim, tree
from jaxlm.config import Hparams
from jaxlm.errors import ConfigError
from jaxlm.optim import chain, schedules, transforms
from tests.optim.small import (
    DEFAULT,
    GRADIENTS,
    GROUPS,
    KERNELS,
    PARAMS,
    STEPS,
    assert_close,
    assert_same_bits,
    run,
    split,
    update,
)


def test_the_default_chain_is_optaxs_to_the_bit():
    spec, numbers = split(DEFAULT)

    def by_hand(numbers):
        clip, adam, decay, rate = (numbers[stage] for stage in DEFAULT["chain"])
        shape = schedules.warmup_cosine(STEPS, warmup=rate["warmup"], final=rate["final"])
        return optax.chain(
            transforms.clip_by_global_norm(clip["max_norm"]),
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
        return optax.with_extra_args_support(optax.chain(transforms.clip_by_global_norm(1.0), adamw))

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
    explained = optim.explain(spec, jax.eval_shape(lambda: PARAMS))
    assert [bool(touched.stages) for touched in explained.values()] == jax.tree.leaves(changed)
    assert list(explained) == tree.paths(PARAMS)


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
        optim.explain({"chain": ("scale",), "scale": {"step_size": 1.0, "where": "^kernel"}}, PARAMS)


# the learning rate


@pytest.mark.parametrize("stage", ["scale_by_learning_rate", "adamw"])
def test_the_learning_rate_is_the_scheduled_one(stage):
    table = {"peak": 0.5, "schedule": "warmup_linear", "warmup": 4.0, "final": 0.0}
    spec = {"chain": ("clip_by_global_norm", stage), "clip_by_global_norm": {"max_norm": 1.0}, stage: table}
    rates = [float(chain.learning_rates(spec, None, 12, jnp.int32(count))[stage]) for count in (0, 2, 4, 8, 12)]
    np.testing.assert_allclose(rates, [0, 0.25, 0.5, 0.25, 0], atol=1e-7)


def test_the_learning_rate_follows_traced_numbers():
    spec, numbers = split(DEFAULT)
    numbers["scale_by_learning_rate"] = {"peak": 8.0, "warmup": 0.5, "final": 1.0}
    rates = jax.jit(lambda n: chain.learning_rates(spec, n, 8, jnp.int32(2)))(numbers)
    assert rates == {"scale_by_learning_rate": 4.0}


def test_a_plain_learning_rate_is_itself():
    spec = {"chain": ("sgd",), "sgd": {"learning_rate": 0.25}}
    assert chain.learning_rates(spec, None, STEPS, jnp.int32(3)) == {"sgd": 0.25}


def test_a_chain_without_a_learning_rate_has_none():
    assert chain.learning_rates({"chain": ("scale_by_adam",)}, None, STEPS, jnp.int32(3)) == {}


def test_a_peak_of_the_users_own_meaning_is_no_learning_rate(module):
    module("jaxlm_test_peak", "def own(peak, sharpness):\n    return optax.scale(peak * sharpness)\n")
    spec = {"chain": ("own",), "own": {"transform": "jaxlm_test_peak:own", "peak": 1.0, "sharpness": 2.0}}
    assert chain.learning_rates(spec, None, STEPS, jnp.int32(3)) == {}


def test_a_function_that_makes_no_transform_is_refused(module):
    module("jaxlm_test_none", "def nothing(x):\n    return x\n")
    spec = {"chain": ("nothing",), "nothing": {"transform": "jaxlm_test_none:nothing", "x": 1.0}}
    with pytest.raises(ConfigError, match="optimizer stage 'nothing' is no transform: it returned float"):
        chain.build(spec, None, STEPS)


def test_a_functions_own_complaint_is_kept(module):
    module("jaxlm_test_complains", "def complains():\n    raise ValueError('not on a Sunday')\n")
    with pytest.raises(ConfigError, match=r"optimizer stage 'jaxlm_test_complains:complains': \w+: not on a Sunday"):
        chain.build({"chain": ("jaxlm_test_complains:complains",)}, None, STEPS)


# partitions


def test_a_partition_sends_parameters_through_chains_of_their_own():
    spec, numbers = split(GROUPS)
    assert numbers == {"sgd": {"learning_rate": np.float32(0.5)}, "rate": {"peak": np.float32(0.25)}}
    after = run(lambda numbers: chain.build(spec, numbers, STEPS), numbers)[0]
    expected = {
        "h": {
            "attn": {"kernel": -0.5 * GRADIENTS[0]["h"]["attn"]["kernel"]},
            "ln_1": jax.tree.map(lambda g: -0.25 * jnp.sign(g), GRADIENTS[0]["h"]["ln_1"]),
        },
        "wte": {"embedding": 0.0},
    }
    expected["h"]["attn"]["bias"] = -0.25 * jnp.sign(GRADIENTS[0]["h"]["attn"]["bias"])
    assert_close(after, jax.tree.map(jnp.add, PARAMS, expected))


def test_a_frozen_group_uses_no_optimizer_memory():
    shapes = {leaf.shape for leaf in jax.tree.leaves(chain.build(GROUPS, None, STEPS).init(PARAMS))}
    assert (7, 4) not in shapes and (1, 6) in shapes  # no embedding, but biases


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"a": {"where": "kernels", "chain": ()}}, "group(s|'s groups) 'a' leave 'h/attn/bias' to no group"),
        (
            {"a": {"where": "all", "chain": ()}, "b": {"where": "^wte", "chain": ()}},
            "groups 'a', 'b' are both to take 'wte/embedding'",
        ),
        ({"a": {"where": "all", "chain": ()}, "b": {"where": "rest", "chain": ()}}, "group 'b' takes the 'rest', and"),
        (
            {"a": {"where": "rest", "chain": ()}, "b": {"where": "rest", "chain": ()}},
            "'a' and 'b' both take the 'rest'",
        ),
        ({"a": {"where": "kernles", "chain": ()}}, "'kernles' matches no parameter"),
    ],
)
def test_a_partition_covers_each_parameter_once(groups, said):
    with pytest.raises(ConfigError, match=said):
        chain.build({"chain": ("partition",), "partition": groups}, None, STEPS).init(PARAMS)


def test_each_learning_rate_of_a_partition_is_told():
    rates = chain.learning_rates(GROUPS, None, STEPS, jnp.int32(0))
    assert rates == {"sgd": 0.5, "rate": 0.25}


@pytest.mark.parametrize("names", [("scale_by_lion", "lookahead"), ("partition",)])
def test_a_wrapper_without_stages_after_it_is_refused(names):
    groups = {"a": {"where": "all", "chain": ("lookahead",)}}
    with pytest.raises(ConfigError, match="optimizer stage 'lookahead' holds the stages after it, and there are none"):
        chain.build({"chain": names, "partition": groups}, None, STEPS)


# numbers that follow a schedule


def test_any_number_may_follow_a_schedule():
    table = {"peak": 0.5, "schedule": "warmup_linear", "warmup": 0.0, "final": 0.0}
    spec, numbers = split({"chain": ("scale",), "scale": {"step_size": table}})
    assert numbers == {"scale": {"step_size": {"peak": 0.5, "warmup": 0.0, "final": 0.0}}}
    moves = []
    before = PARAMS
    for after in run(lambda numbers: chain.build(spec, numbers, 10), numbers):
        moves.append(float((after["wte"]["embedding"] - before["wte"]["embedding"])[0, 0]))
        before = after
    factors = [move / float(g["wte"]["embedding"][0, 0]) for move, g in zip(moves, GRADIENTS)]
    np.testing.assert_allclose(factors, 0.5 * (1 - np.arange(10) / 10), rtol=1e-3)


def test_decay_that_follows_a_constant_schedule_is_constant_decay():
    decay = {"where": "kernels", "weight_decay": {"peak": 0.1, "schedule": "constant"}}
    spec, numbers = split({**DEFAULT, "add_decayed_weights": decay})
    expected, by_hand = split(DEFAULT)
    assert_same_bits(
        run(lambda numbers: chain.build(spec, numbers, STEPS), numbers),
        run(lambda numbers: chain.build(expected, numbers, STEPS), by_hand),
    )


# what stages are given


def test_update_gives_all_that_a_stage_may_want(module):
    module(
        "jaxlm_test_wants",
        "def wants():\n"
        "    def update(updates, state, params=None, *, value, grad, value_fn, obj_fn):\n"
        "        return grad, (value, value_fn(params), obj_fn(params))\n"
        "    return optax.GradientTransformationExtraArgs(lambda params: (jnp.float32(0),) * 3, update)\n",
    )
    transform = chain.build({"chain": ("scale", "jaxlm_test_wants:wants"), "scale": {"step_size": 0.0}}, None, STEPS)

    def objective(params):
        return tree.norm(params)

    updates, state = chain.update(transform, GRADIENTS[0], transform.init(PARAMS), PARAMS, objective)
    assert_same_bits(updates, GRADIENTS[0])
    assert {float(x) for x in jax.tree.leaves(state[1])} == {float(tree.norm(PARAMS))}


def test_in_a_part_of_the_parameters_value_fn_is_a_function_of_the_part():
    def value_fn(params):
        return sum(jnp.sum(leaf**3) for leaf in jax.tree.leaves(params))

    groups = {"a": {"where": "kernels", "chain": ("sam", "sgd")}, "b": {"where": "rest", "chain": ()}}
    spec = {"chain": ("partition",), "partition": groups, "sam": {"rho": 0.1}, "sgd": {"learning_rate": 0.1}}
    kernels = jax.tree.map(lambda leaf, on: leaf if on else None, PARAMS, tree.mask(PARAMS, "kernels"))

    def updates(spec, params):
        transform = chain.build(spec, None, STEPS)
        out, _ = chain.update(transform, jax.grad(value_fn)(params), transform.init(params), params, value_fn)
        return dict(zip(tree.paths(out), jax.tree.leaves(out), strict=True))

    found, alone = updates(spec, PARAMS), updates({**spec, "chain": ("sam", "sgd")}, kernels)
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, alone.get(path, jnp.zeros_like(leaf)), rtol=1e-6)


def test_a_configs_numbers_are_taken_as_they_are():
    spec, numbers = split(DEFAULT)
    whole = Hparams(np.float32(0), {}, numbers)
    assert_same_bits(
        run(lambda all_: chain.build(spec, all_, STEPS), whole), run(lambda n: chain.build(spec, n, STEPS), numbers)
    )


@pytest.mark.parametrize("edit", ["drop", "insert_after", "insert_before", "replace", "with_args"])
def test_the_edits_of_a_spec_are_here_too(edit):
    assert getattr(chain, edit) is getattr(optim, edit)


@pytest.mark.parametrize("name", ["prodigy", "dadapt_adamw"])
def test_a_warmup_from_0_lets_what_divides_by_its_rates_move(name):
    transform = chain.build({"chain": (name,), name: {"peak": 1.0, "warmup": 0.5}}, None, 4)
    state = transform.init(PARAMS)
    for gradients in GRADIENTS[:3]:
        updates, state = transform.update(gradients, state, PARAMS)
    assert all(np.isfinite(x).all() and np.any(x != 0) for x in jax.tree.leaves(updates))


@pytest.mark.parametrize("name", ["sm3", "rprop"])
def test_a_rate_that_can_follow_no_schedule_is_told(name):
    with pytest.raises(ConfigError, match=f"set optimizer.{name}.learning_rate, without a peak"):
        chain.build({"chain": (name,), name: {"peak": 0.1}}, None, STEPS)


def test_a_number_needs_no_schedule_to_have_a_warmup():
    spec = {"chain": ("add_decayed_weights",), "add_decayed_weights": {"weight_decay": {"peak": 0.5, "warmup": 0.5}}}
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    transform = chain.build(spec, None, 2)
    first, state = transform.update(zeros, transform.init(PARAMS), PARAMS)
    second, _ = transform.update(zeros, state, PARAMS)
    assert_close(first, zeros)
    assert_close(second, jax.tree.map(lambda p: 0.5 * p, PARAMS))
