import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.model import losses

B, T, V = 3, 5, 7
RNG = np.random.default_rng(0)
LOGITS = (3 * RNG.normal(size=(B, T, V))).astype(np.float32)
TARGETS = RNG.integers(0, V, (B, T), dtype=np.int32)
WEIGHTS = RNG.uniform(0, 2, (B, T)).astype(np.float32) * (RNG.uniform(size=(B, T)) > 0.3)
PARAMS = {
    "h": {"c_fc": {"kernel": RNG.normal(size=(2, 3, 4)).astype(np.float32), "bias": np.ones((2, 4), np.float32)}},
    "ln_f": {"scale": np.ones(3, np.float32)},
    "wte": {"embedding": np.ones((7, 3), np.float32)},
    "out": {"kernel": RNG.normal(size=(3, 4)).astype(np.float32)},
}


def by_hand(label_smoothing=0.0, z_loss=0.0):
    """The four sums from distributions in float64, token by token."""
    objective = nll = correct = 0.0
    for b, t in np.ndindex(B, T):
        logits = np.float64(LOGITS[b, t])
        log_z = np.log(np.sum(np.exp(logits)))
        wanted = (1 - label_smoothing) * np.eye(V)[TARGETS[b, t]] + label_smoothing / V
        objective += WEIGHTS[b, t] * (-np.sum(wanted * (logits - log_z)) + z_loss * log_z**2)
        nll += WEIGHTS[b, t] * (log_z - logits[TARGETS[b, t]])
        correct += WEIGHTS[b, t] * (np.argmax(logits) == TARGETS[b, t])
    return losses.TokenSums(objective, nll, correct, np.sum(WEIGHTS, dtype=np.float64))


@pytest.mark.parametrize(
    "terms",
    [{}, {"label_smoothing": 0.1}, {"z_loss": 0.01}, {"label_smoothing": 0.3, "z_loss": 0.1}],
    ids=str,
)
def test_sums_are_those_by_hand(terms):
    np.testing.assert_allclose(losses.token_sums(LOGITS, TARGETS, WEIGHTS, **terms), by_hand(**terms), rtol=1e-5)


def test_some_tokens_are_right_and_some_are_not():
    sums = losses.token_sums(LOGITS, TARGETS, np.ones((B, T), np.float32))
    assert 0 < sums.correct < sums.weight == B * T


@pytest.mark.parametrize("name", ["label_smoothing", "z_loss"])
def test_off_is_zero_strength(name):
    off, zero = losses.token_sums(LOGITS, TARGETS, WEIGHTS), losses.token_sums(LOGITS, TARGETS, WEIGHTS, **{name: 0.0})
    np.testing.assert_allclose(off, zero, rtol=1e-6)


def test_a_weight_of_zero_hides_a_token():
    hidden = WEIGHTS == 0
    assert hidden.any()
    logits, targets = LOGITS.copy(), TARGETS.copy()
    logits[hidden], targets[hidden] = 50.0, (targets[hidden] + 1) % V
    np.testing.assert_array_equal(
        losses.token_sums(logits, targets, WEIGHTS), losses.token_sums(LOGITS, TARGETS, WEIGHTS)
    )


@pytest.mark.parametrize("axis", [0, 1])
def test_sums_add_over_parts_of_a_batch(axis):
    def sums(rows):
        part = (np.take(x, rows, axis) for x in (LOGITS, TARGETS, WEIGHTS))
        return jax.jit(losses.token_sums)(*part, label_smoothing=0.1, z_loss=0.1)

    np.testing.assert_allclose(np.add(sums([0]), sums([1, 2])), sums([0, 1, 2]), rtol=1e-5)


def test_bfloat16_logits_are_summed_in_float32():
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    sums = losses.token_sums(logits, TARGETS, WEIGHTS)
    assert {leaf.dtype for leaf in sums} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(sums, losses.token_sums(logits.astype(jnp.float32), TARGETS, WEIGHTS))


def test_large_logits_stay_finite():
    sums = losses.token_sums(LOGITS * 1e4, TARGETS, WEIGHTS, label_smoothing=0.1, z_loss=0.1)
    assert np.all(np.isfinite(sums))


@pytest.mark.parametrize("strengths", [{"l1": 0.3}, {"l2": 0.2}, {"l1": 0.3, "l2": 0.2}], ids=str)
def test_penalty_is_on_kernels_with_its_closed_form_gradient(strengths):
    l1, l2 = strengths.get("l1", 0.0), strengths.get("l2", 0.0)
    kernels = [PARAMS["h"]["c_fc"]["kernel"], PARAMS["out"]["kernel"]]
    value, gradient = jax.value_and_grad(losses.penalty)(PARAMS, **strengths)
    np.testing.assert_allclose(value, sum(l1 * abs(w).sum() + l2 / 2 * (w**2).sum() for w in kernels), rtol=1e-5)
    expected = jax.tree.map(np.zeros_like, PARAMS)
    expected["h"]["c_fc"]["kernel"], expected["out"]["kernel"] = (l1 * np.sign(w) + l2 * w for w in kernels)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-6), gradient, expected)


def test_no_penalty_is_zero():
    assert losses.penalty(PARAMS) == 0 and losses.penalty(PARAMS).dtype == jnp.float32
