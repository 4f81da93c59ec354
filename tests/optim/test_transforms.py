import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import lookup, tree
from jaxlm.errors import ConfigError
from jaxlm.optim import chain, transforms
from tests.optim.trajectory import GRADIENTS, PARAMS, STEPS, adam, assert_close, checked, leaf

UPDATES = {"w": jnp.array([1.0, -2.0]), "b": jnp.float32(3.0)}


def test_scale_by_learning_rate_counts_from_zero_and_descends():
    transform = transforms.scale_by_learning_rate(0.5, 10, "warmup_linear", warmup=2, final=0.0)
    state = transform.init(UPDATES)
    for rate in (0.0, 0.25, 0.5, 0.4375):  # warmup over 2 steps, then a line over 8
        out, state = transform.update(UPDATES, state)
        jax.tree.map(lambda got, u, rate=rate: np.testing.assert_allclose(got, -rate * u, rtol=1e-6), out, UPDATES)


def test_one_compilation_serves_any_learning_rate():
    traces = []

    @jax.jit
    def update(peak, warmup, final):
        traces.append(1)
        transform = transforms.scale_by_learning_rate(peak, 100, "warmup_cosine", warmup=warmup, final=final)
        return transform.update(UPDATES, transform.init(UPDATES)._replace(count=jnp.int32(50)))[0]["w"]

    peaks = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    outs = [update(jnp.float32(peak), jnp.float32(10), jnp.float32(0)) for peak in peaks]
    assert len(traces) == 1
    np.testing.assert_allclose([out[0] / outs[0][0] for out in outs], np.array(peaks) / peaks[0], rtol=1e-5)


def test_every_name_is_found_and_no_other_function_is_a_transform():
    for name in transforms.__all__:
        assert lookup.find("optimizer transform", name, transforms) is getattr(transforms, name)
    assert set(transforms.__all__) == set(lookup._functions(transforms))


# cautious


def cautious(updates, gradients):
    mask = (updates * gradients > 0).astype(float)
    return updates * mask / max(mask.mean(), 1e-3)


def test_cautious_masks_what_moves_against_its_gradient_and_rescales_each_layer():
    numbers = {"b1": 0.9, "b2": 0.8, "eps": 1e-6}
    updates, _, _ = checked(lambda **n: optax.chain(optax.scale_by_adam(**n), transforms.cautious()), **numbers)
    for path in ("h/attn/c_proj/kernel", "h/ln_1/bias", "wte/embedding", "ln_f/scale", "lm_head/kernel"):
        gradients = leaf(GRADIENTS, path)
        plain = adam(gradients, **numbers)
        if path.startswith("h/"):
            expected = [[cautious(u, g) for u, g in zip(us, gs)] for us, gs in zip(plain, gradients)]
        else:
            expected = [cautious(u, g) for u, g in zip(plain, gradients)]
        np.testing.assert_allclose(leaf(updates, path), expected, rtol=1e-3, atol=1e-5, err_msg=path)
        assert (np.asarray(expected) == 0).any()


def test_cautious_leaves_the_rows_beyond_the_vocabulary_out_of_its_mean():
    update, grad = jax.random.normal(jax.random.key(0), (2, 65, 8))
    table, padded = ({"wte": {"embedding": x}} for x in (update, jnp.pad(update, ((0, 63), (0, 0)))))
    short, _ = transforms.cautious().update(table, optax.EmptyState(), grad={"wte": {"embedding": grad}})
    grad = jnp.pad(grad, ((0, 63), (0, 0)))
    long, _ = transforms.cautious().update(padded, optax.EmptyState(), grad={"wte": {"embedding": grad}})
    np.testing.assert_allclose(long["wte"]["embedding"][:65], short["wte"]["embedding"], rtol=1e-6)
    assert not long["wte"]["embedding"][65:].any()


def test_cautious_changes_nothing_that_agrees_with_the_gradient_and_makes_zeros_of_what_never_does():
    update = jax.jit(lambda grad: transforms.cautious().update(PARAMS, optax.EmptyState(), grad=grad)[0])
    assert_close(update(PARAMS), PARAMS)
    never = update(jax.tree.map(jnp.negative, PARAMS))
    assert not any(u.any() for u in jax.tree.leaves(never))


def test_cautious_behind_a_mask_sees_the_gradients_of_its_own_parameters():
    def updates(transform):
        grad = jax.tree.map(lambda p: jnp.where(p > 1, -p, p), PARAMS)
        transform = optax.with_extra_args_support(transform)
        return jax.jit(lambda: transform.update(PARAMS, transform.init(PARAMS), PARAMS, grad=grad)[0])()

    masked = updates(optax.masked(transforms.cautious(), lambda params: tree.mask(params, "kernels")))
    everywhere = updates(transforms.cautious())
    for path in tree.paths(PARAMS):
        np.testing.assert_array_equal(leaf(masked, path), leaf(everywhere if "kernel" in path else PARAMS, path))


def test_cautious_in_a_chain_is_given_the_gradient():
    spec = {"chain": ("scale_by_adam", "cautious", "scale_by_learning_rate"), "scale_by_learning_rate": {"peak": 0.1}}
    transform = chain.build(spec, None, STEPS)
    negative = jax.tree.map(jnp.negative, PARAMS)
    updates, _ = jax.jit(lambda: transform.update(PARAMS, transform.init(PARAMS), PARAMS, grad=negative))()
    assert not any(u.any() for u in jax.tree.leaves(updates))


# proximal_l1


@pytest.mark.parametrize("schedule", [True, False])
def test_proximal_l1_shrinks_what_the_step_has_reached(schedule):
    def rate(count):
        return 0.1 / (1 + count) if schedule else 0.1

    def make(peak, l1):
        rates = (lambda count: peak * rate(count)) if schedule else peak * rate(0)
        return optax.chain(optax.scale_by_learning_rate(rates), transforms.proximal_l1(l1, rates))

    _, params, _ = checked(make, peak=1.0, l1=2.0)
    for path in ("wte/embedding", "h/ln_1/bias"):
        p = leaf(PARAMS, path)
        for count, g in enumerate(leaf(GRADIENTS, path)):
            p = p - rate(count) * g
            p = np.sign(p) * np.maximum(np.abs(p) - 2.0 * rate(count), 0)
            got = leaf(params, path)[count]
            np.testing.assert_allclose(got, p, rtol=1e-4, atol=1e-6)
        assert 0 < (got == 0).sum() < got.size  # zeros to the bit


def test_proximal_l1_in_a_chain_takes_its_learning_rate_and_its_mask():
    spec = {
        "chain": ("scale_by_learning_rate", "proximal_l1"),
        "scale_by_learning_rate": {"peak": 0.1},
        "proximal_l1": {"l1": 1e3, "where": "kernels"},
    }
    transform = chain.build(spec, None, STEPS)
    updates, _ = jax.jit(lambda: transform.update(PARAMS, transform.init(PARAMS), PARAMS))()
    params = jax.tree.map(np.add, PARAMS, updates)
    for path in tree.paths(PARAMS):
        np.testing.assert_allclose(
            leaf(params, path), leaf(PARAMS, path) * (0 if path.endswith("kernel") else 0.9), 1e-6
        )


# scale_by_layer


def test_scale_by_layer_decays_from_the_head_down_to_the_embeddings():
    ones = jax.tree.map(jnp.ones_like, GRADIENTS)
    updates, _, _ = checked(transforms.scale_by_layer, ones, decay=0.5)
    for path in tree.paths(PARAMS):
        got = leaf(updates, path)[-1]
        if path.startswith("h/"):  # two layers
            np.testing.assert_allclose(got[0], 0.25)
            np.testing.assert_allclose(got[1], 0.5)
        else:
            np.testing.assert_allclose(got, 0.125 if path.endswith("embedding") else 1.0)


def test_scale_by_layer_scales_low_rank_products_with_their_layers():
    thin = {"lora": {"h": {"a": jnp.ones((2, 3))}, "wte": {"embedding": {"a": jnp.ones((2, 3))}}}}
    updates, _ = transforms.scale_by_layer(0.5).update(thin, optax.EmptyState())
    np.testing.assert_allclose(updates["lora"]["h"]["a"][:, 0], [0.25, 0.5])
    np.testing.assert_allclose(updates["lora"]["wte"]["embedding"]["a"], 0.125)


def test_scale_by_layer_wants_to_see_how_many_layers_there_are():
    embeddings = {"wte": PARAMS["wte"]}
    with pytest.raises(ConfigError, match="sees embeddings but no layers"):
        transforms.scale_by_layer(0.5).update(embeddings, transforms.scale_by_layer(0.5).init(embeddings))
    alone = transforms.scale_by_layer(0.5).update({"ln_f": PARAMS["ln_f"]}, None)[0]
    assert_close(alone, {"ln_f": PARAMS["ln_f"]})


@pytest.mark.parametrize("max_norm", [1e-3, 0.7, 1e6])
def test_clipping_is_optaxs_up_to_rounding(max_norm):
    updates, state = jax.jit(transforms.clip_by_global_norm(max_norm).update)(GRADIENTS, optax.EmptyState())
    expected, _ = optax.clip_by_global_norm(max_norm).update(GRADIENTS, optax.EmptyState())
    assert state == optax.EmptyState()
    for path, x, y in zip(tree.paths(updates), jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=3e-7 if max_norm < 1e6 else 0, err_msg=path)
