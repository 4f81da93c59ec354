import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from jaxlm import tree
from jaxlm.errors import ConfigError
from jaxlm.optim import parts, wrappers
from tests.optim.trajectory import (
    GRADIENTS,
    PARAMS,
    STEPS,
    adam,
    assert_close,
    checked,
    float64,
    leaf,
    loss,
    trajectory,
)

PATHS = ("h/attn/c_proj/kernel", "wte/embedding")


def at(trees, i):
    return jax.tree.map(lambda x: x[i], trees)


# lookahead


def test_lookahead_is_its_formula():
    def make(rate, slow_step_size):
        return wrappers.lookahead(optax.sgd(rate, momentum=0.9), sync_period=2, slow_step_size=slow_step_size)

    _, params, state = checked(make, rate=0.1, slow_step_size=0.4)
    for path in PATHS:
        fast = slow = leaf(PARAMS, path)
        momentum = 0.0
        for t, g in enumerate(leaf(GRADIENTS, path), 1):
            momentum = 0.9 * momentum + g
            fast = fast - 0.1 * momentum
            if t % 2 == 0:
                slow = slow + 0.4 * (fast - slow)
                fast = slow
            np.testing.assert_allclose(leaf(params, path)[t - 1], fast, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(leaf(state.slow, path), slow, rtol=1e-4, atol=1e-5)


def test_lookahead_is_optaxs_on_pairs_of_parameters():
    ours = trajectory(wrappers.lookahead(optax.adam(0.1), sync_period=3, slow_step_size=0.5))[1]
    theirs, params = optax.lookahead(optax.adam(0.1), 3, 0.5), optax.LookaheadParams.init_synced(PARAMS)
    state = theirs.init(params)
    step = jax.jit(theirs.update)
    for i in range(STEPS):
        updates, state = step(at(GRADIENTS, i), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        assert_close(at(ours, i), params.fast)


def test_lookahead_refuses_a_period_below_one():
    with pytest.raises(ConfigError, match="sync_period=0, but it counts steps"):
        wrappers.lookahead(optax.sgd(0.1), sync_period=0)


# skip_nonfinite


@functools.cache
def skipping():
    return jax.jit(lambda gradients: trajectory(wrappers.skip_nonfinite(optax.adam(0.1)), gradients))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_skip_nonfinite_goes_on_as_if_the_step_had_not_been(bad):
    poisoned = jax.tree.map(jnp.copy, GRADIENTS)
    poisoned["ln_f"]["scale"] = poisoned["ln_f"]["scale"].at[2, 1].set(bad)
    run = skipping()
    updates, params, state = run(poisoned)
    assert not any(u[2].any() for u in jax.tree.leaves(updates))
    assert int(state.skipped) == 1
    without = jax.tree.map(lambda g: jnp.concatenate([g[:2], g[3:], jnp.full_like(g[:1], jnp.nan)]), GRADIENTS)
    _, expected, state_of_four = run(without)
    assert_close(at(params, -1), at(expected, -1), rtol=0, atol=0)
    assert_close(state, state_of_four, rtol=0, atol=0)


def test_skip_nonfinite_never_gives_in():
    nan = jax.tree.map(lambda g: jnp.full((20, *g.shape[1:]), jnp.nan), GRADIENTS)
    _, params, state = skipping()(nan)
    assert_close(at(params, -1), PARAMS, rtol=0, atol=0)
    assert int(state.skipped) == 20


def test_skip_nonfinite_skips_what_only_the_inner_update_makes_infinite_and_what_it_only_hides():
    overflow = optax.stateless(lambda updates, params: jax.tree.map(lambda u: u * 1e38 * 1e38, updates))
    _, params, state = trajectory(wrappers.skip_nonfinite(overflow))
    assert_close(at(params, -1), PARAMS, rtol=0, atol=0)
    assert int(state.skipped) == STEPS

    hides = wrappers.skip_nonfinite(optax.chain(optax.trace(0.9), optax.zero_nans()))
    nan = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), GRADIENTS)
    _, _, state = trajectory(hides, nan)
    assert int(state.skipped) == STEPS and all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_skip_nonfinite_holds_back_only_the_lane_that_is_hit():
    lanes = jax.tree.map(lambda g: jnp.stack([g.at[..., 0].set(jnp.nan), g]), GRADIENTS)
    updates, _, states = jax.vmap(skipping())(lanes)
    assert states.skipped.tolist() == [STEPS, 0]
    assert_close(at(updates, 1), skipping()(GRADIENTS)[0])
    assert not any(u[0].any() for u in jax.tree.leaves(updates))


# skip_spikes


VALUES = np.random.default_rng(3).normal(3.0, 0.1, 40).astype(np.float32)
VALUES[[1, 9, 14, 20]] = np.nan, 9.0, np.inf, 4.0  # before the window is full too
VALUES[26:] += 2  # another regime


def held_back(z, values=VALUES, window=5):
    """Parameters after each step of momentum, of the gradient 1, and the last state."""
    transform = wrappers.skip_spikes(optax.sgd(0.1, momentum=0.9), window, z)

    def step(carry, value):
        params, state = carry
        updates, state = transform.update(jnp.float32(1), state, params, value=value)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    (_, state), params = jax.lax.scan(step, (jnp.float32(0), transform.init(jnp.float32(0))), values)
    return params, state


def held_back_in_numpy(z, values=VALUES, window=5):
    last, in_a_row, skipped, momentum, p, out = [], 0, [], 0.0, 0.0, []
    for i, value in enumerate(values):
        if not np.isfinite(value) or (len(last) == window and value > np.mean(last) + z * np.std(last)):
            skipped.append(i)
            in_a_row += 1
            if in_a_row == window:
                last, in_a_row = [], 0
        else:
            last, in_a_row = [*last, value][-window:], 0
            momentum = 0.9 * momentum + 1
            p -= 0.1 * momentum
        out.append(p)
    return np.array(out), skipped, last


@pytest.mark.parametrize("z", [6.0, 1.0, 100.0])
def test_skip_spikes_is_its_rule(z):
    expected, skipped, last = held_back_in_numpy(z)
    params, state = jax.jit(held_back)(z)
    np.testing.assert_allclose(params, expected, rtol=1e-5)
    assert int(state.skipped) == len(skipped) and sorted(state.losses.tolist()) == sorted(last)
    if z == 6.0:
        assert skipped == [1, 9, 14, 20, 26, 27, 28, 29, 30]


@pytest.mark.parametrize(("value", "skipped"), [(5.9, 0), (6.1, 1)])
def test_skip_spikes_counts_in_deviations_over_n(value, skipped):
    assert int(held_back(2.0, jnp.float32([3, 5, value]), window=2)[1].skipped) == skipped


def test_skip_spikes_has_a_z_for_each_lane():
    z = jnp.float32([1.0, 6.0, 100.0])
    together = jax.jit(jax.vmap(held_back))(z)
    assert len(set(together[1].skipped.tolist())) == 3
    for i in range(3):
        assert_close(at(together, i), jax.jit(held_back)(z[i]))


def test_skip_spikes_is_not_poisoned_and_never_takes_what_is_not_finite():
    params, state = held_back(6.0, jnp.full(12, jnp.nan))
    assert not params.any() and int(state.skipped) == 12
    assert np.isfinite(state.losses).all()


def test_skip_spikes_refuses_a_window_without_a_deviation():
    with pytest.raises(ConfigError, match="window=1, but a deviation takes losses"):
        wrappers.skip_spikes(optax.sgd(0.1), window=1)


# schedule_free, mechanize, sam


def test_schedule_free_is_its_formula_and_evaluates_the_average():
    def rate(peak, count):
        return peak * jnp.minimum(count, 3) / 3

    def make(peak, b1):
        schedule = functools.partial(rate, peak)
        inner = optax.chain(optax.scale_by_adam(b1=0.0), optax.scale_by_learning_rate(schedule))
        return wrappers.schedule_free(inner, schedule, b1=b1)

    _, params, state = checked(make, peak=0.1, b1=0.8)
    evaluated = wrappers.evaluation_params(state, at(params, -1))
    assert list(evaluated) == [""]
    for path in PATHS:
        x = y = z = leaf(PARAMS, path)
        total = 0.0
        for count, u in enumerate(adam(leaf(GRADIENTS, path), 0.0, 0.999, 1e-8)):
            z = z - float(rate(0.1, count)) * u
            weight = float(rate(0.1, count)) ** 2
            total += weight
            x = x + (weight / total if total else 0.0) * (z - x)
            y = 0.8 * x + 0.2 * z
            np.testing.assert_allclose(leaf(params, path)[count], y, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(leaf(evaluated[""], path), x, rtol=1e-3, atol=1e-5)
    theirs = optax.contrib.schedule_free_eval_params(state, at(params, -1))
    assert_close(evaluated[""], theirs, rtol=0, atol=1e-6)


def test_schedule_free_refuses_a_mean_that_leaves_the_average_out():
    with pytest.raises(ConfigError, match=r"schedule_free: b1=0.0; expected above 0"):
        wrappers.schedule_free(optax.sgd(0.1), 0.1, b1=0.0)


def mechanic(gradients, params, weight_decay, eps, s_init, num_betas):
    """Parameters after each step of Mechanic around SGD with a rate of 1, all of them as one vector."""
    start, p = params, params
    betas = 1 - 0.1 ** np.arange(1, num_betas + 1)
    r = v = m = np.zeros(num_betas)
    s, out = np.full(num_betas, s_init), []
    for g in gradients:
        delta = (p - start) / (s.sum() + eps)
        decayed = g + weight_decay * s.sum() * np.linalg.norm(g) / (np.linalg.norm(p) + eps) * p
        h = -decayed @ delta
        clipped = np.clip(h, -m, m)
        m = np.maximum(betas * m, abs(h) + eps)
        v = betas**2 * v + h**2
        r = betas * r + clipped * s
        s = (s_init / num_betas * m + np.maximum(r, 0)) / (np.sqrt(v) + eps)
        p = start + s.sum() * (delta - g)
        out.append(p)
    return np.array(out)


def test_mechanize_is_its_formula_around_a_chain():
    numbers = {"weight_decay": 0.1, "eps": 1e-3, "s_init": 0.1}
    _, params, _ = checked(lambda **n: wrappers.mechanize(optax.sgd(1.0), num_betas=3, **n), **numbers)
    flat = np.concatenate([np.reshape(g, (STEPS, -1)) for g in jax.tree.leaves(float64(GRADIENTS))], axis=1)
    start = np.concatenate([np.ravel(p) for p in jax.tree.leaves(float64(PARAMS))])
    expected = mechanic(flat, start, num_betas=3, **numbers)
    got = np.concatenate([np.reshape(p, (STEPS, -1)) for p in jax.tree.leaves(params)], axis=1)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_sam_takes_the_gradient_at_the_perturbed_parameters():
    def make(rho, rate):
        return wrappers.sam(optax.sgd(rate, momentum=0.9), rho)

    _, params, _ = checked(make, rho=0.5, rate=0.1)
    p, gradients = float64(PARAMS), float64(GRADIENTS)
    momentum = jax.tree.map(np.zeros_like, p)
    for i in range(STEPS):
        g = at(gradients, i)
        norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(g)))
        there = jax.tree.map(lambda p, g, norm=norm: -np.sin(p + 0.5 * g / norm), p, g)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, there)
        p = jax.tree.map(lambda p, m: p - 0.1 * m, p, momentum)
        assert_close(at(params, i), p)


def test_sam_is_optaxs_opaque_mode_and_hands_the_new_gradient_on():
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append((updates, extra))
        return updates, state

    spy = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    gradients = jax.grad(loss)(PARAMS)
    ours = wrappers.sam(optax.chain(spy, optax.sgd(0.1)), rho=0.5)
    got, _ = ours.update(gradients, ours.init(PARAMS), PARAMS, value_fn=loss, grad=gradients, value=1.0)
    theirs = optax.contrib.sam(optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.5)), opaque_mode=True)
    expected, _ = theirs.update(gradients, theirs.init(PARAMS), PARAMS, grad_fn=lambda p, _: jax.grad(loss)(p))
    assert_close(got, expected)
    ((updates, extra),) = seen
    assert extra["grad"] is updates and extra["value"] == 1.0 and extra["value_fn"] is loss


def test_sam_at_a_gradient_of_zero_is_the_inner_step():
    transform = wrappers.sam(optax.sgd(0.1))
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    got, _ = transform.update(zero, transform.init(PARAMS), PARAMS, value_fn=loss)
    assert_close(got, jax.tree.map(lambda g: -0.1 * g, jax.grad(loss)(PARAMS)))


# ema_of_params and evaluation_params


@pytest.mark.parametrize("debias", [True, False])
def test_ema_of_params_averages_the_new_parameters_and_changes_no_update(debias):
    def make(decay):
        return optax.chain(optax.sgd(0.1), wrappers.ema_of_params(decay, debias))

    updates, params, state = checked(make, decay=0.7)
    assert_close(updates, jax.tree.map(lambda g: -0.1 * g, GRADIENTS))
    average = wrappers.evaluation_params(state, at(params, -1))["ema"]
    for path in PATHS:
        weights = 0.3 * 0.7 ** np.arange(STEPS)[::-1]
        after = np.tensordot(weights, leaf(params, path), 1)
        expected = after / (1 - 0.7**STEPS) if debias else after + 0.7**STEPS * leaf(PARAMS, path)
        np.testing.assert_allclose(leaf(average, path), expected, rtol=1e-4, atol=1e-5)


def test_before_the_first_step_all_that_is_evaluated_is_the_parameters():
    state = optax.chain(optax.sgd(0.1), wrappers.ema_of_params()).init(PARAMS)
    for params in wrappers.evaluation_params(state, PARAMS).values():
        assert_close(params, PARAMS, rtol=0, atol=0)
    state = wrappers.schedule_free(optax.sgd(0.1), 0.1).init(PARAMS)
    assert_close(wrappers.evaluation_params(state, PARAMS)[""], PARAMS)


def test_evaluation_params_of_any_other_state_are_the_parameters():
    state = optax.chain(optax.adam(0.1), wrappers.lookahead(optax.sgd(0.1))).init(PARAMS)
    assert list(wrappers.evaluation_params(state, PARAMS)) == [""]
    assert wrappers.evaluation_params(state, PARAMS)[""] is PARAMS


def test_evaluation_params_finds_averages_at_any_depth_and_fills_what_masks_leave_out():
    half, gradients = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (PARAMS, GRADIENTS))
    inner = optax.chain(optax.sgd(0.1), wrappers.ema_of_params(0.5))
    kernels = wrappers.skip_nonfinite(wrappers.schedule_free(inner, 0.1))
    rest = optax.chain(optax.sgd(0.1), wrappers.ema_of_params(0.5))

    def labels(params):
        return jax.tree.map(lambda kernel: "kernels" if kernel else "rest", tree.mask(params, "kernels"))

    transform = parts.freeze(optax.partition({"kernels": kernels, "rest": rest}, labels), "embeddings")
    _, params, state = trajectory(transform, gradients, half)
    last = at(params, -1)
    evaluated = jax.jit(wrappers.evaluation_params)(state, last)
    assert list(evaluated) == ["", "ema"]
    for path in tree.paths(PARAMS):
        raw, averaged, ema = (leaf(t, path) for t in (last, evaluated[""], evaluated["ema"]))
        assert np.array_equal(averaged, raw) == (not path.endswith("kernel")), path
        assert np.array_equal(ema, raw) == path.endswith("embedding"), path
    assert all(p.dtype == jnp.bfloat16 for p in jax.tree.leaves(evaluated))

    lanes = jax.tree.map(lambda x: np.stack([x, x]), (state, last))
    together = jax.jit(jax.vmap(wrappers.evaluation_params))(*lanes)
    assert_close(at(float64(together), 1), float64(evaluated), rtol=1e-2)


@pytest.mark.parametrize(
    "transform",
    [
        wrappers.lookahead(optax.sgd(0.1)),
        wrappers.schedule_free(optax.sgd(0.1), 0.1),
        wrappers.mechanize(optax.sgd(0.1)),
        wrappers.ema_of_params(),
    ],
    ids=["lookahead", "schedule_free", "mechanize", "ema_of_params"],
)
def test_states_hold_copies_so_that_parameters_and_state_can_both_be_donated(transform):
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((PARAMS, transform.init(PARAMS)))]
    assert len(set(buffers)) == len(buffers)


@pytest.mark.parametrize("debias", [True, False])
def test_the_average_keeps_its_dtype_where_numbers_are_double(debias):
    with jax.enable_x64(True):
        average = wrappers.ema_of_params(debias=debias)
        before = jax.eval_shape(average.init, PARAMS)
        _, after = jax.eval_shape(average.update, PARAMS, before, PARAMS)
    assert jax.tree.leaves(after) == jax.tree.leaves(before)
