import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxlm.model import decode
from jaxlm.model.decode import Sampling

V, CONTEXT, NEW = 50, 80, 64
NEVER = -1  # an end of text that no row draws
GREEDY = Sampling(temperature=0)
PROMPTS = [[7], [3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1], [11, 12, 13, 14, 15]]
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time


@pytest.fixture(scope="module")
def model(build):
    return build(context_length=CONTEXT)


@pytest.fixture(scope="module")
def params(model):
    """Far from initialisation, so that greedy text varies and no two logits are close."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(5)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        return {"scale": 1 + 0.1 * noise, "bias": 0.1 * noise}.get(path[-1].key, 0.5 * noise)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def keys(n, seed=0):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(n))


@pytest.fixture(scope="module")
def generate(model, params):
    """(prompts, ...) -> ids[B, N], compiled once a shape and sampling."""

    @functools.partial(jit, static_argnames=("max_tokens", "sampling"))
    def run(tokens, start, row_keys, drawn, end_of_text, max_tokens, sampling):
        facts = dict(max_tokens=max_tokens, end_of_text=end_of_text, sampling=sampling)
        return decode.generate(model, params, tokens, start, row_keys, drawn, **facts)

    def call(prompts, sampling=GREEDY, row_keys=None, drawn=0, end_of_text=NEVER, max_tokens=NEW):
        row_keys = keys(len(prompts)) if row_keys is None else row_keys
        out = run(*decode.pad_left(prompts), row_keys, drawn, end_of_text, max_tokens=max_tokens, sampling=sampling)
        return np.asarray(out)

    return call


@pytest.fixture(scope="module")
def logits(model, params):
    """(sequences of unequal length) -> the uncached logits; padding on the right is not seen, by causality."""
    apply = jit(functools.partial(model.apply, params))

    def call(sequences):
        ids = np.zeros((len(sequences), CONTEXT), np.int32)
        for row, sequence in zip(ids, sequences):
            row[: len(sequence)] = sequence
        return np.asarray(apply({"inputs": ids}))

    return call


# the cache


def test_greedy_with_a_cache_is_greedy_without(generate, logits):
    new = generate(PROMPTS)
    assert new.shape == (4, NEW) and new.dtype == np.int32
    for prompt, ids, row in zip(PROMPTS, new, logits([[*p, *n] for p, n in zip(PROMPTS, new.tolist())])):
        np.testing.assert_array_equal(ids, row[len(prompt) - 1 : len(prompt) - 1 + NEW].argmax(-1))
        assert len(set(ids.tolist())) > 5, "text of one token would agree by chance"


def test_cached_logits_are_the_uncached(model, params, logits):
    tokens, start = decode.pad_left(PROMPTS)
    extend = jit(model.decode)
    prefill, cache = extend(params, tokens, model.cache(start, 10))
    more = np.array([[1], [2], [3], [4]], np.int32)
    step, cache = extend(params, more, cache)
    assert cache.length == 9
    expected = logits([[*prompt, *new] for prompt, new in zip(PROMPTS, more)])
    for b, prompt in enumerate(PROMPTS):
        scale = np.abs(expected[b]).max()
        np.testing.assert_allclose(prefill[b], expected[b, len(prompt) - 1], atol=1e-5 * scale)
        np.testing.assert_allclose(step[b], expected[b, len(prompt)], atol=1e-5 * scale)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.5)], ids=["greedy", "sampled"])
def test_a_row_does_not_depend_on_the_others(generate, sampling):
    together = generate(PROMPTS, sampling, max_tokens=12)
    for b in (0, 1):
        alone = generate([PROMPTS[b]], sampling, row_keys=keys(4)[b : b + 1], max_tokens=12)
        np.testing.assert_array_equal(alone[0], together[b])


def test_a_row_repeats_the_end_of_text_once_drawn(generate):
    free = generate(PROMPTS)
    end = int(free[1, 10])
    first = [row.index(end) if end in row else NEW for row in free.tolist()]
    stopped = generate(PROMPTS, end_of_text=end)
    for b, n in enumerate(first):
        np.testing.assert_array_equal(stopped[b, :n], free[b, :n])
        assert np.all(stopped[b, n:] == end)
    assert min(first) < NEW and len(set(first)) > 1


def test_draws_go_on_where_they_were(generate):
    sampled = Sampling(temperature=1.0)
    whole = generate(PROMPTS, sampled, max_tokens=12)
    longer = [[*prompt, *ids] for prompt, ids in zip(PROMPTS, whole[:, :5].tolist())]
    np.testing.assert_array_equal(generate(longer, sampled, drawn=5, max_tokens=7), whole[:, 5:])
    assert np.any(generate(longer, sampled, drawn=0, max_tokens=7) != whole[:, 5:])


def test_other_keys_draw_other_text(generate):
    sampled = Sampling(temperature=1.0)
    assert np.any(
        generate(PROMPTS, sampled, max_tokens=12) != generate(PROMPTS, sampled, keys(4, seed=1), max_tokens=12)
    )


# prompts


def test_prompts_are_padded_on_the_left():
    tokens, start = decode.pad_left([[1, 2, 3], [4]], pad=9)
    np.testing.assert_array_equal(tokens, [[1, 2, 3], [9, 9, 4]])
    np.testing.assert_array_equal(start, [0, 2])
    assert tokens.dtype == start.dtype == np.int32


def test_what_pads_does_not_matter(model, params):
    sevens, zeros = (
        jit(model.decode)(params, tokens, model.cache(start, 8))[0]
        for tokens, start in (decode.pad_left(PROMPTS, pad=pad) for pad in (7, 0))
    )
    np.testing.assert_array_equal(sevens, zeros)


@pytest.mark.parametrize("prompts", [[[]], [[1], []]])
def test_an_empty_prompt_is_an_error(prompts):
    with pytest.raises(ValueError, match="a prompt is empty; begin with the end-of-text token"):
        decode.pad_left(prompts)


# complete


def complete(model, params, prompts, max_tokens, context_length=CONTEXT, end_of_text=NEVER, sampling=GREEDY):
    facts = dict(max_tokens=max_tokens, context_length=context_length, end_of_text=end_of_text, sampling=sampling)
    return decode.complete(model, params, prompts, **facts)


def test_completions_are_what_is_generated(model, params, generate):
    assert complete(model, params, PROMPTS, 12) == generate(PROMPTS, max_tokens=12).tolist()


def test_a_completion_ends_before_the_end_of_text(model, params, generate):
    free = generate(PROMPTS, max_tokens=12).tolist()
    end = free[1][3]
    expected = [row[: row.index(end)] if end in row else row for row in free]
    assert complete(model, params, PROMPTS, 12, end_of_text=end) == expected


def test_past_the_context_half_a_window_is_read_again(model, params, generate):
    prompt, context = PROMPTS[1], 12
    (ids,) = complete(model, params, [prompt], 10, context_length=context)
    full = prompt + generate([prompt], max_tokens=4)[0].tolist()  # 8 and 4 fill the window
    again = generate([full[-6:]], max_tokens=6)[0].tolist()
    assert ids == full[8:] + again


def test_of_a_prompt_longer_than_the_context_half_a_window_is_read(model, params, generate):
    prompt = list(range(20))
    assert complete(model, params, [prompt], 3, context_length=12) == generate([prompt[-6:]], max_tokens=3).tolist()


# drawing from logits


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
    for row, filtered in zip(rows, np.asarray(decode.filter_logits(jnp.asarray(rows), sampling))):
        assert set(np.flatnonzero(np.isfinite(filtered)).tolist()) == kept(row, sampling)
        stays = np.isfinite(filtered)
        np.testing.assert_allclose(filtered[stays], row[stays] / sampling.temperature, rtol=1e-6)


def test_top_k_goes_before_top_p():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
    both = decode.filter_logits(logits, Sampling(1.0, top_k=2, top_p=0.55))  # 0.4 / 0.7 is 0.57
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
    filtered = decode.filter_logits(jnp.asarray(logits)[None], sampling)[0]
    draws = jax.vmap(lambda key: jax.random.categorical(key, filtered))(jax.random.split(jax.random.key(0), 20_000))
    assert_drawn_from(np.asarray(draws), distribution(logits, sampling))


def test_generated_tokens_follow_the_models_softmax(generate, logits):
    sampling, prompt = Sampling(1.2, top_k=20, top_p=0.9), PROMPTS[2]
    draws = generate([prompt] * 4000, sampling, max_tokens=1)[:, 0]
    expected = distribution(logits([prompt])[0, len(prompt) - 1], sampling)
    assert np.sum(expected > 0.02) > 3
    assert_drawn_from(draws, expected)
