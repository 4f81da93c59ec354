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


# From hidden states


D, PADDED = 6, 12
HIDDEN = RNG.normal(size=(2, 8, D)).astype(np.float32)
HEAD = np.where(np.arange(PADDED)[:, None] < 10, RNG.normal(size=(PADDED, D)), 9.0).astype(np.float32)  # 2 rows pad
ROWS = RNG.integers(0, 10, (2, 8), dtype=np.int32)
SHARES = RNG.uniform(0, 2, (2, 8)).astype(np.float32)
TERMS = [{}, {"label_smoothing": 0.2}, {"z_loss": 0.05}, {"label_smoothing": 0.1, "z_loss": 0.01}]


def by_logits(hidden, head, weights, terms):
    logits = jnp.einsum("btd,vd->btv", hidden, head[:10].astype(hidden.dtype), preferred_element_type=jnp.float32)
    return losses.token_sums(logits, ROWS, weights, **terms)


def by_head(hidden, head, weights, terms, chunks=1):
    return losses.head_sums(hidden, head, ROWS, weights, vocab_size=10, chunks=chunks, **terms)


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_head_sums_are_token_sums_and_so_are_their_gradients(terms, chunks):
    terms = jax.tree.map(jnp.float32, terms)
    np.testing.assert_allclose(
        by_head(HIDDEN, HEAD, SHARES, terms, chunks), by_logits(HIDDEN, HEAD, SHARES, terms), rtol=1e-6
    )

    def gradients(sums, **options):
        return jax.grad(lambda *args: sums(*args, **options).objective * 0.3, (0, 1, 2, 3))(HIDDEN, HEAD, SHARES, terms)

    for found, expected in zip(
        jax.tree.leaves(gradients(by_head, chunks=chunks)), jax.tree.leaves(gradients(by_logits)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_head_sums_in_bfloat16_follow_float32(terms):
    hidden = jnp.asarray(HIDDEN, jnp.bfloat16)
    exact = jax.grad(lambda h, w: by_logits(h, w, SHARES, terms).objective, (0, 1))(HIDDEN, HEAD)
    found = jax.grad(lambda h, w: by_head(h, w, SHARES, terms).objective, (0, 1))(hidden, HEAD)
    assert [x.dtype for x in found] == [jnp.bfloat16, jnp.float32]
    for one, other in zip(found, exact, strict=True):
        assert np.linalg.norm(np.float32(one) - other) <= 1e-2 * np.linalg.norm(other)


def test_a_head_in_bfloat16_has_a_gradient_in_bfloat16():
    head = jnp.asarray(HEAD, jnp.bfloat16)
    found = jax.grad(lambda w: by_head(HIDDEN, w, SHARES, {}, chunks=2).objective)(head)
    expected = jax.grad(lambda w: by_logits(HIDDEN, w, SHARES, {}).objective)(head)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(found), np.float32(expected), rtol=2e-2, atol=1e-2)


def test_ties_and_nan_count_as_argmax_counts_them():
    hidden = jnp.asarray(np.eye(D)[None, [0, 1, 2, 3]], jnp.float32)
    head = np.zeros((PADDED, D), np.float32)
    head[[3, 5], 0] = 2.0  # a tie at the top, the target first
    head[[3, 5], 1] = 2.0  # and second
    head[4, 2] = 1.0
    head[:, 3] = np.nan
    targets, ones = np.array([[3, 5, 4, 0]], np.int32), np.ones((1, 4), np.float32)

    def correct(t):
        return losses.head_sums(hidden[:, t : t + 1], head, targets[:, t : t + 1], ones[:, :1], vocab_size=10).correct

    head = np.where(np.isnan(head), 0.0, head)
    assert [float(correct(t)) for t in range(3)] == [1.0, 0.0, 1.0]
    head[0, 3] = np.nan
    assert float(correct(3)) == 0.0


def temporaries(dtype, chunks):
    """Bytes that the loss of a GPT-2 vocabulary and its gradients take; chunks=0 is autodiff of float32 logits."""
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((2, 256, 64), dtype), ((50304, 64), jnp.float32))]
    ids, ones = jax.ShapeDtypeStruct((2, 256), jnp.int32), jnp.ones((2, 256))

    def plain(h, w, t):
        logits = jnp.einsum("btd,vd->btv", h, w.astype(h.dtype), preferred_element_type=jnp.float32)
        return losses.token_sums(logits, t, ones).objective

    def mine(h, w, t):
        return losses.head_sums(h, w, t, ones, vocab_size=50304, chunks=chunks).objective

    compiled = jax.jit(jax.grad(mine if chunks else plain, (0, 1))).lower(*shapes, ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_save_memory(dtype):
    assert temporaries(dtype, 4) <= 0.4 * temporaries(dtype, 0)


@pytest.mark.gpu
def test_logits_in_bfloat16_save_memory():
    assert temporaries("bfloat16", 1) <= 0.6 * temporaries("bfloat16", 0)


def test_chunks_that_do_not_divide():
    with pytest.raises(ValueError, match="8 positions do not divide into 3 chunks of the loss"):
        by_head(HIDDEN, HEAD, SHARES, {}, chunks=3)
