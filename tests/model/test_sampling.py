import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxlm.model import sampling as drawing
from jaxlm.model.sampling import Draws, Sampling

draw = jax.jit(drawing.draw, static_argnames="kind")


def draws(count, sampling):
    return Draws(np.arange(count, dtype=np.uint32), sampling, end_of_text=-1)


def softmax(x):
    e = np.exp(np.float64(x) - np.max(x))
    return e / e.sum()


def kept(logits, sampling):
    """The ids that may be drawn, by hand."""
    order = np.argsort(-logits)
    if sampling.top_k:
        order = order[: sampling.top_k]
    probability = softmax(logits[order] / sampling.temperature)
    if sampling.top_p < 1:
        order = order[: int(np.searchsorted(np.cumsum(probability), sampling.top_p)) + 1]
    return set(order.tolist())


SAMPLINGS = [
    Sampling(0.7),
    Sampling(2.0),
    Sampling(1.0, top_k=1),
    Sampling(1.0, top_k=4),
    Sampling(1.0, top_k=100),
    Sampling(1.0, top_p=0.6),
    Sampling(0.5, top_p=0.9),
    Sampling(1.0, top_p=1e-6),
    Sampling(1.5, top_k=6, top_p=0.7),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_filtered_logits_are_those_by_hand(sampling):
    rows = (2 * np.random.default_rng(0).normal(size=(20, 12))).astype(np.float32)
    scaled = rows / np.float32(sampling.temperature)
    for row, whole, filtered in zip(rows, scaled, np.asarray(drawing.filter_logits(jnp.asarray(scaled), sampling))):
        stays = np.isfinite(filtered)
        assert set(np.flatnonzero(stays).tolist()) == kept(row, sampling)
        np.testing.assert_array_equal(filtered[stays], whole[stays])


def test_filters_that_are_off_keep_all_whatever_a_sum_is_rounded_to():
    logits = 20 * jax.random.normal(jax.random.key(0), (4, 5000))
    np.testing.assert_array_equal(drawing.filter_logits(logits, Sampling()), logits)


def test_equals_at_the_border_stay():
    logits = jnp.array([[2.0, 1.0, 0.0, 1.0, -0.0]])
    assert np.isfinite(drawing.filter_logits(logits, Sampling(top_k=2)))[0].tolist() == [1, 1, 0, 1, 0]


def test_top_k_goes_before_top_p():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
    both = drawing.filter_logits(logits, Sampling(1.0, top_k=2, top_p=0.55))  # 0.4 / 0.7 is 0.57
    assert jnp.isfinite(both).tolist() == [[True, False, False, False]]


def assert_drawn_from(draws, expected):
    """Chi-square: the frequencies of draws are not told from `expected`, and nothing else was drawn."""
    counts = np.bincount(draws, minlength=len(expected))
    possible = expected > 0
    assert counts[~possible].sum() == 0
    rare = expected * len(draws) < 5  # pooled, as the test wants
    pooled = [np.append(x[~rare], x[rare].sum()) for x in (counts, expected * len(draws))]
    observed, wanted = (x[pooled[1] > 0] for x in pooled)
    assert len(observed) == 1 or scipy.stats.chisquare(observed, wanted).pvalue > 1e-3


def distribution(logits, sampling):
    ids = sorted(kept(logits, sampling))
    expected = np.zeros(len(logits))
    expected[ids] = softmax(logits[ids] / sampling.temperature)
    return expected


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_draws_follow_the_softmax_of_what_is_kept(sampling):
    logits = np.random.default_rng(1).normal(size=12).astype(np.float32)
    rows, nothing = np.tile(logits, (20_000, 1)), np.zeros((20_000, 12), bool)
    tokens, logprobs = draw(rows, nothing, np.full(20_000, 7), draws(20_000, sampling), sampling.kind)
    assert_drawn_from(np.asarray(tokens), distribution(logits, sampling))
    np.testing.assert_allclose(logprobs, np.log(softmax(logits))[tokens], rtol=1e-5)  # of what was not filtered


@pytest.mark.parametrize("temperature", [0, 1e-46, 1e-37, 1e-3])
def test_towards_temperature_0_the_most_probable_is_drawn(temperature):
    logits = np.random.default_rng(2).normal(size=(50, 12)).astype(np.float32)
    sampling = Sampling(temperature)
    tokens, _ = draw(logits, np.zeros((50, 12), bool), np.zeros(50, int), draws(50, sampling), sampling.kind)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_the_penalty_makes_what_was_seen_rarer():
    logits = jnp.array([[2.0, -2.0, 2.0, -2.0]])
    seen = jnp.array([[True, True, False, False]])
    assert drawing.penalize(logits, seen, 4.0).tolist() == [[0.5, -8.0, 2.0, -2.0]]
    _, logprobs = draw(logits, seen, np.zeros(1, int), draws(1, Sampling(0, repetition_penalty=4.0)), "greedy")
    np.testing.assert_allclose(logprobs, np.log(softmax(logits[0]))[2], rtol=1e-5)  # what was drawn, as it was
