"""Decoupled decay, L2 and L1 in the loss, and proximal L1, told apart by closed forms on a linear model.

The loss is c w, so the gradient is c at every step and Adam's update is its sign. What each kind of regularisation
makes of that over t steps can be written down.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import optim
from jaxlm.model import losses
from jaxlm.optim import chain, transforms
from tests.optim.small import DEFAULT, GRADIENTS, KERNELS, PARAMS, STEPS, split

W = np.array([0.5, -0.8, 1.5], np.float32)
C = np.array([0.2, -0.3, 0.1], np.float32)
RATE, STRENGTH, T = 0.01, 0.1, 20


def after(spec, **penalties):
    """w after T steps of the optimizer on c w and the penalties."""
    transform = chain.build(spec, None, T)

    def objective(params):
        return jnp.sum(C * params["linear"]["kernel"]) + losses.penalty(params, **penalties)

    params = {"linear": {"kernel": jnp.asarray(W)}}
    state = transform.init(params)
    for _ in range(T):
        grads = jax.grad(objective)(params)
        updates, state = chain.update(transform, grads, state, params, objective)
        params = optax.apply_updates(params, updates)
    return np.asarray(params["linear"]["kernel"])


SGD = {"chain": ("scale_by_learning_rate",), "scale_by_learning_rate": {"peak": RATE}}
ADAM = {**SGD, "chain": ("scale_by_adam", "scale_by_learning_rate"), "scale_by_adam": {"eps": 0.0}}
DECAY = {"weight_decay": STRENGTH, "where": "kernels"}
ADAMW = {**optim.insert_after(ADAM, "scale_by_adam", "add_decayed_weights", **DECAY)}
L2_ADAM = {**optim.insert_before(ADAM, "scale_by_adam", "l2", transform="add_decayed_weights", **DECAY)}


def shrinking(pull):
    """w <- (1 - lr s) w - lr pull, T times."""
    factor = (1 - RATE * STRENGTH) ** T
    return W * factor - pull / STRENGTH * (1 - factor)


def test_adamw_shrinks_by_the_weight_beside_adams_sign():
    np.testing.assert_allclose(after(ADAMW), shrinking(np.sign(C)), rtol=1e-4)


def test_l2_in_the_loss_under_sgd_is_weight_decay():
    np.testing.assert_allclose(after(SGD, l2=STRENGTH), shrinking(C), rtol=1e-4)
    decayed = optim.insert_before(SGD, "scale_by_learning_rate", "add_decayed_weights", **DECAY)
    np.testing.assert_allclose(after(decayed), shrinking(C), rtol=1e-4)


def test_l2_under_adam_is_not_adamw_but_is_the_penalty_in_the_loss():
    np.testing.assert_allclose(after(L2_ADAM), after(ADAM, l2=STRENGTH), rtol=1e-5)
    assert np.abs(after(L2_ADAM) - after(ADAMW)).max() > 1e-3


def test_l1_in_the_loss_pulls_by_a_constant():
    np.testing.assert_allclose(after(SGD, l1=STRENGTH), W - T * RATE * (C + STRENGTH * np.sign(W)), rtol=1e-4)


def test_l1_under_adam_is_lost_where_the_gradient_is_larger_and_proximal_l1_is_not():
    assert np.array_equal(np.sign(C + STRENGTH * np.sign(W)), np.sign(C))  # so Adam sees no difference
    np.testing.assert_allclose(after(ADAM, l1=STRENGTH), W - T * RATE * np.sign(C), rtol=1e-4)
    proximal = optim.insert_after(ADAM, "scale_by_learning_rate", "proximal_l1", l1=STRENGTH)
    moved = W - T * RATE * np.sign(C)
    np.testing.assert_allclose(after(proximal), moved - T * RATE * STRENGTH * np.sign(W), rtol=1e-4)


def test_proximal_l1_makes_exact_zeros():
    proximal = optim.insert_after(SGD, "scale_by_learning_rate", "proximal_l1", l1=10.0)
    assert not after(proximal).any()


@pytest.mark.parametrize("what", ["flops", "bytes accessed"])
def test_a_chain_costs_what_the_one_by_hand_costs(what):
    spec, numbers = split(DEFAULT)

    def by_hand(numbers):
        clip, adam, decay, rate = (numbers[stage] for stage in DEFAULT["chain"])
        schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 4, STEPS, 1e-4)
        return optax.chain(
            transforms.clip_by_global_norm(clip["max_norm"]),
            optax.scale_by_adam(b1=adam["b1"], b2=adam["b2"], eps=adam["eps"]),
            optax.add_decayed_weights(decay["weight_decay"], KERNELS),
            optax.scale_by_schedule(lambda count: -schedule(count) * rate["peak"]),
        )

    wide = jax.tree.map(lambda x: jnp.tile(x, (1,) * (x.ndim - 1) + (512,)), (PARAMS, GRADIENTS[0]))

    def cost(make):
        def step(numbers, params, grads, state):
            updates, state = make(numbers).update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.eval_shape(lambda numbers: make(numbers).init(wide[0]), numbers)
        return jax.jit(step).lower(numbers, *wide, state).compile().cost_analysis()[what]

    ours = cost(lambda numbers: chain.build(spec, numbers, STEPS))
    assert ours == pytest.approx(cost(by_hand), rel=0.01)
