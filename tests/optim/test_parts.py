"""What trains a part of the parameters: the rest stands still, and the part is trained as if it were all there is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import tree
from jaxlm.errors import ConfigError
from jaxlm.optim import chain, parts, transforms, wrappers
from tests.optim.trajectory import GRADIENTS, PARAMS, assert_close, checked, loss, trajectory

# freeze


def test_freeze_holds_its_parameters_still_without_memory_and_out_of_the_global_norm():
    def make(max_norm):
        return parts.freeze(optax.chain(optax.clip_by_global_norm(max_norm), optax.scale_by_adam()), "embeddings")

    def drop(params):
        return {name: part for name, part in params.items() if name != "wte"}

    updates, _, state = checked(make, max_norm=1.0)
    assert not updates["wte"]["embedding"].any()
    alone = trajectory(
        optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam()), drop(GRADIENTS), drop(PARAMS)
    )
    assert_close(drop(updates), alone[0])
    assert tree.size(state) == tree.size(alone[2])


def test_inside_of_freeze_value_fn_is_a_function_of_the_trained_parameters():
    def value_fn(params):
        return jnp.sum(params["lm_head"]["kernel"] @ params["wte"]["embedding"])

    gradients = jax.grad(value_fn)(PARAMS)
    transform = parts.freeze(wrappers.sam(optax.sgd(0.1), rho=0.0), "embeddings")
    updates, _ = transform.update(gradients, transform.init(PARAMS), PARAMS, value_fn=value_fn)
    assert not updates["wte"]["embedding"].any()
    assert_close(updates["lm_head"]["kernel"], -0.1 * gradients["lm_head"]["kernel"])


@pytest.mark.parametrize(
    ("where", "message"), [("all", "leaves nothing to train"), ("^decoder", "matches no parameter")]
)
def test_freeze_of_everything_or_of_nothing_is_refused(where, message):
    with pytest.raises(ConfigError, match=message):
        parts.freeze(optax.adam(0.1), where).init(PARAMS)


# train_last_layers


def last(params):
    """The second of the two layers, and what is in no layer."""
    axis = params["ln_f"]["scale"].ndim - 1  # that of the steps, if there is one
    return params | {"h": jax.tree.map(lambda x: jax.lax.slice_in_dim(x, 1, 2, axis=axis), params["h"])}


def test_the_last_layers_train_as_if_they_were_all_and_the_others_stand_still_without_memory():
    def make(max_norm):
        inner = optax.chain(optax.clip_by_global_norm(max_norm), optax.adamw(0.1, weight_decay=0.1))
        return parts.train_last_layers(inner, 1)

    updates, params, state = checked(make, max_norm=1.0)
    alone = trajectory(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.1)), last(GRADIENTS), last(PARAMS)
    )
    assert_close(last(updates), alone[0])
    for after, before in zip(jax.tree.leaves(params["h"]), jax.tree.leaves(PARAMS["h"])):
        np.testing.assert_array_equal(after[-1, 0], before[0])
        assert (after[-1, 1] != before[1]).any()
    assert tree.size(state) == tree.size(alone[2])


def test_last_layers_within_freeze_and_around_an_average():
    inner = parts.train_last_layers(optax.chain(optax.sgd(0.1), wrappers.ema_of_params(0.5)), 1)
    _, params, state = trajectory(parts.freeze(inner, "embeddings"))
    final = jax.tree.map(lambda x: x[-1], params)
    np.testing.assert_array_equal(final["wte"]["embedding"], PARAMS["wte"]["embedding"])
    average = wrappers.evaluation_params(state, final)["ema"]
    for own, now, before in zip(*(jax.tree.leaves(x["h"]) for x in (average, final, PARAMS)), strict=True):
        np.testing.assert_array_equal(own[0], before[0])
        assert (own[1] != now[1]).any() and (own[1] != before[1]).any()


@pytest.mark.parametrize("count", [1, 2])
def test_last_layers_around_schedule_free(count):
    """Of three layers the last are averaged as if they were all, and the others stand still."""

    def three(x):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.concatenate([leaf, leaf[:1] + 1]) if tree.of_layers(path) else leaf, x
        )

    def trained(transform, params):
        state = transform.init(params)
        for scale in (1.0, 0.5, 2.0):
            gradients = jax.tree.map(lambda p, scale=scale: scale * jnp.cos(p), params)
            updates, state = transform.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return wrappers.evaluation_params(state, params)[""]

    def last(params):
        return params | {"h": jax.tree.map(lambda x: x[-count:], params["h"])}

    params, inner = three(PARAMS), wrappers.schedule_free(optax.sgd(0.1), 0.1)
    found = trained(parts.train_last_layers(inner, count), params)
    assert_close(last(found), trained(inner, last(params)))
    for own, before in zip(jax.tree.leaves(found["h"]), jax.tree.leaves(params["h"]), strict=True):
        np.testing.assert_array_equal(own[:-count], before[:-count])


def test_inside_of_last_layers_value_fn_is_a_function_of_them():
    def value_fn(params):
        return sum(jnp.sum(jnp.cos(x)) for x in jax.tree.leaves(params))

    gradients = jax.grad(value_fn)(PARAMS)
    transform = parts.train_last_layers(wrappers.sam(optax.sgd(0.1), rho=0.0), 1)
    updates, _ = transform.update(gradients, transform.init(PARAMS), PARAMS, value_fn=value_fn)
    assert_close(last(updates), jax.tree.map(lambda g: -0.1 * g, last(gradients)))


def test_inside_of_last_layers_the_gradient_is_of_them():
    updates = jax.tree.map(lambda g: g[0], GRADIENTS)
    gradients = jax.tree.map(lambda g: g[1], GRADIENTS)
    cautious = transforms.cautious()
    transform = parts.train_last_layers(cautious, 1)
    found, _ = transform.update(updates, transform.init(PARAMS), PARAMS, grad=gradients)
    alone, _ = cautious.update(last(updates), cautious.init(last(PARAMS)), last(PARAMS), grad=last(gradients))
    assert_close(last(found), alone)
    assert not any(leaf[0].any() for leaf in jax.tree.leaves(found["h"]))


def test_inside_of_last_layers_the_rates_by_layer_are_those_of_the_whole_model():
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    whole = transforms.scale_by_layer(0.5)
    transform = parts.train_last_layers(whole, 1)
    found, _ = transform.update(ones, transform.init(PARAMS), PARAMS)
    assert_close(last(found), last(whole.update(ones, whole.init(PARAMS))[0]))


def test_the_last_layers_of_low_rank_products_train_alone():
    params = {"h": {"a": jnp.ones((2, 3))}, "lora": {"h": {"a": jnp.ones((2, 3))}}}
    transform = parts.train_last_layers(optax.sgd(1.0), 1)
    updates, _ = transform.update(params, transform.init(params), params)
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_array_equal(leaf[:, 0], [0, -1])


@pytest.mark.parametrize("count", [0, 3, -1])
def test_a_number_of_layers_that_cannot_be(count):
    with pytest.raises(ConfigError, match=f"count={count}; expected 1 to 2"):
        parts.train_last_layers(optax.sgd(0.1), count).init(PARAMS)


def test_last_layers_of_none():
    with pytest.raises(ConfigError, match="there are no layers"):
        parts.train_last_layers(optax.sgd(0.1), 1).init({"wte": PARAMS["wte"]})


# line searches


GROUPS = {"a": {"where": "embeddings", "chain": ()}, "b": {"where": "rest", "chain": ("search",)}}


@pytest.mark.parametrize(
    ("names", "table"),
    [
        (("freeze", "search"), {"where": "embeddings"}),
        (("train_last_layers", "search"), {"count": 1}),
        (("partition",), GROUPS),
    ],
)
def test_a_line_search_works_in_a_part(names, table):
    search = {"transform": "scale_by_backtracking_linesearch", "max_backtracking_steps": 5}
    spec = {"chain": names, names[0]: table, "search": search}
    transform = chain.build(spec, None, 1)

    @jax.jit
    def moved(params):
        gradients = jax.grad(loss)(params)
        updates, _ = chain.update(transform, gradients, transform.init(params), params, loss)
        return updates

    updates = moved(PARAMS)
    assert updates["h"]["ln_1"]["bias"][1].any()
    assert updates["wte"]["embedding"].any() == (names[0] == "train_last_layers")
    assert updates["h"]["ln_1"]["bias"][0].any() == (names[0] != "train_last_layers")
