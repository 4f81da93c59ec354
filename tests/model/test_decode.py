import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config
from jaxlm.errors import ConfigError
from jaxlm.model import decode, huggingface
from jaxlm.model.sampling import Draws, Sampling
from tests.model.test_sampling import assert_drawn_from, distribution

V, CONTEXT, NEW = 50, 80, 64
NEVER = -1  # an end of text that no row draws
GREEDY = Sampling(temperature=0)
SAMPLED = Sampling(1.5)
PROMPTS = [[7], [3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1], [11, 12, 13, 14, 15]]
VARIED = dict(tie_embeddings=False, scale_attention=False, scale_attention_by_layer=True, activation="relu")


def weights(model):
    """Far from initialisation, so that greedy text varies and no two logits are close."""
    rng = np.random.default_rng(5)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        return {"scale": 1 + 0.1 * noise, "bias": 0.1 * noise}.get(path[-1].key, 0.5 * noise)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))


@pytest.fixture(scope="module")
def model(build):
    return build(context_length=CONTEXT)


@pytest.fixture(scope="module")
def params(model):
    return weights(model)


@pytest.fixture(scope="module")
def unstacked(model, params):
    return model.unstack(params)


@pytest.fixture(scope="module")
def complete(model, unstacked):
    """(prompts, sampling, ...) -> completions, with seeds 0, 1, ..."""

    def call(prompts, sampling=GREEDY, seeds=None, max_tokens=NEW, context_length=CONTEXT, end_of_text=NEVER, **more):
        facts = dict(max_tokens=max_tokens, context_length=context_length, end_of_text=end_of_text, sampling=sampling)
        seeds = range(len(prompts)) if seeds is None else seeds
        return decode.complete(model, unstacked, prompts, seeds, **{"vocab_size": V, **facts, **more})

    return call


@pytest.fixture(scope="module")
def ids(complete):
    return lambda *args, **more: [completion.tokens for completion in complete(*args, **more)]


begin = jax.jit(decode.begin, static_argnames=("model", "slots", "kind"))
advance = jax.jit(decode.advance, static_argnames=("model", "every", "kind"), donate_argnames="state")


def draws(seeds, sampling=GREEDY, end_of_text=NEVER):
    return Draws(np.array(seeds, np.uint32), sampling, end_of_text)


def nothing(rows):
    """Seen, and drawn before."""
    return np.zeros((rows, V), bool), np.zeros(rows, np.int32)


def uncached(model, params, sequences):
    """Logits [B, T, V]; padding on the right is not seen, by causality."""
    tokens = np.zeros((len(sequences), CONTEXT), np.int32)
    for row, sequence in zip(tokens, sequences):
        row[: len(sequence)] = sequence
    return np.asarray(jax.jit(model.apply)(params, {"inputs": tokens}))


# the cache


@pytest.mark.parametrize("fields", [{}, VARIED], ids=["gpt2", "varied"])
def test_greedy_with_a_cache_is_greedy_without(fields, build):
    model = build(context_length=CONTEXT, **fields)
    params = weights(model)
    facts = dict(max_tokens=NEW, context_length=CONTEXT, vocab_size=V, end_of_text=NEVER, sampling=GREEDY)
    found = decode.complete(model, model.unstack(params), PROMPTS, [0] * 4, **facts)
    logits = uncached(model, params, [[*prompt, *new.tokens] for prompt, new in zip(PROMPTS, found)])
    for prompt, new, row in zip(PROMPTS, found, logits):
        assert new.finish == "length" and len(new.tokens) == NEW
        before = row[len(prompt) - 1 : len(prompt) - 1 + NEW]
        np.testing.assert_array_equal(new.tokens, before.argmax(-1))
        np.testing.assert_allclose(
            new.logprobs, np.asarray(jax.nn.log_softmax(before))[range(NEW), new.tokens], atol=1e-4
        )
        assert len(set(new.tokens)) > 5, "text of one token would agree by chance"


def test_greedy_is_transformers_greedy(model, params, ids, tmp_path):
    torch = pytest.importorskip("torch", reason="needs PyTorch: `make torch` with Python 3.11")
    from transformers import GPT2LMHeadModel

    changes = dict(num_layers=2, num_heads=2, embed_dim=16, context_length=CONTEXT, vocab_size=V)
    cfg = config.override(config.default(), {f"model.{name}": value for name, value in changes.items()})
    huggingface.write(tmp_path, params, config.resolve(cfg).model, special_ids={"bos_token_id": 0, "eos_token_id": 0})
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    theirs.generation_config.eos_token_id = None
    tokens, start = decode.pad_left(PROMPTS)
    mask = np.arange(tokens.shape[1]) >= start[:, None]
    settings = dict(do_sample=False, max_new_tokens=NEW, pad_token_id=0)
    out = theirs.generate(torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long(), **settings)
    assert ids(PROMPTS) == out[:, tokens.shape[1] :].tolist()
    penalized = ids(PROMPTS, Sampling(0, repetition_penalty=1.3))
    for prompt, new in zip(PROMPTS, penalized):  # one by one: transformers' penalty meets the padding too
        out = theirs.generate(torch.tensor([prompt]), repetition_penalty=1.3, **settings)
        assert new == out[0, len(prompt) :].tolist()
    assert penalized != ids(PROMPTS)


def test_cached_logits_are_the_uncached(model, params, unstacked):
    tokens, start = decode.pad_left(PROMPTS)
    prefill, cache = jax.jit(model.prefill, static_argnums=3)(unstacked, tokens, start, 10)
    more = np.array([1, 2, 3, 4], np.int32)
    step, cache = jax.jit(model.decode)(unstacked, more, cache)
    assert cache.length == 9
    expected = uncached(model, params, [[*prompt, new] for prompt, new in zip(PROMPTS, more)])
    for b, prompt in enumerate(PROMPTS):
        scale = np.abs(expected[b]).max()
        np.testing.assert_allclose(prefill[b], expected[b, len(prompt) - 1], atol=1e-5 * scale)
        np.testing.assert_allclose(step[b], expected[b, len(prompt)], atol=1e-5 * scale)


@pytest.mark.parametrize("tied", [True, False])
def test_in_bfloat16_matrices_are_cast_once_and_the_logits_are_those_of_apply(tied, build):
    model = build(dtype="bfloat16", tie_embeddings=tied)
    params = weights(model)
    unstacked = model.unstack(params)
    layer = unstacked["layers"][0]
    cast = {x.dtype for x in jax.tree.leaves((layer["attn"], layer["mlp"], unstacked["head"]))}
    kept = {x.dtype for x in jax.tree.leaves((layer["ln_1"], unstacked["wte"], unstacked["ln_f"]))}
    assert (cast, kept) == ({jnp.dtype("bfloat16")}, {jnp.dtype("float32")})
    logits, cache = jax.jit(model.prefill, static_argnums=3)(unstacked, *decode.pad_left([[1, 2, 3]]), 3)
    assert cache.kv[0][0].dtype == jnp.bfloat16
    expected = jax.jit(model.apply)(params, {"inputs": np.array([[1, 2, 3]])})[:, -1]
    np.testing.assert_allclose(logits, expected, atol=0.02 * np.abs(expected).max())


def test_layers_are_copied_and_nothing_else(model, params):
    params = jax.tree.map(jnp.asarray, params)
    unstacked = model.unstack(params)
    for part in (unstacked, unstacked["head"]):
        assert part["wte"]["embedding"] is params["wte"]["embedding"]


# what a row depends on


def test_a_row_depends_on_its_prompt_and_seed_alone(ids):
    together = ids(PROMPTS, SAMPLED, max_tokens=12)
    assert ids(PROMPTS[1:2], SAMPLED, seeds=[1], max_tokens=12) == together[1:2]
    assert ids(PROMPTS[:3], SAMPLED, max_tokens=12) == together[:3]  # in a bucket of four
    longer = ids([*PROMPTS, list(range(20))], SAMPLED, max_tokens=20)  # buckets for more rows, prompts and new tokens
    assert [row[:12] for row in longer[:4]] == together


def test_more_rows_than_run_at_once(ids, monkeypatch):
    together = ids(PROMPTS, SAMPLED, max_tokens=12)
    monkeypatch.setattr(decode, "ROWS", 4)
    assert ids([*PROMPTS, PROMPTS[2]], SAMPLED, seeds=[0, 1, 2, 3, 2], max_tokens=12) == [*together, together[2]]


def test_other_seeds_draw_other_text(ids):
    first, other, again = ids([PROMPTS[0]] * 3, SAMPLED, seeds=[1, 2, 1], max_tokens=12)
    assert first == again != other


def test_one_program_serves_a_bucket_whatever_the_numbers(model, unstacked):
    traced = []

    def counted(name):
        def call(*args):
            traced.append(name)
            return getattr(model, name)(*args)

        return call

    counting = model._replace(prefill=counted("prefill"), decode=counted("decode"))
    asked = [
        ([[1]], [5], Sampling(0.5, top_k=3), 9, 7),
        ([list(range(16))], [6], Sampling(2.0, top_p=0.5, repetition_penalty=2.0), 16, NEVER),
        ([[1, 2, 3]], [2**32 - 1], Sampling(0.9, top_k=7, top_p=0.9), 11, 3),
    ]
    for prompts, seeds, sampling, max_tokens, end_of_text in asked:
        facts = dict(context_length=CONTEXT, vocab_size=V, end_of_text=end_of_text, max_tokens=max_tokens)
        decode.complete(counting, unstacked, prompts, seeds, sampling=sampling, **facts)
    assert sorted(traced) == ["decode", "prefill"]
    decode.complete(counting, unstacked, [[1] * 17], [0], sampling=sampling, **facts)  # the next bucket
    assert sorted(traced) == ["decode", "decode", "prefill", "prefill"]


def test_no_token_copies_weights_or_the_cache(model, unstacked):
    """In the compiled loop: of a cache in another layout, or of stacked weights, each token would copy all."""
    prompt = decode.pad_left(PROMPTS)
    facts = draws([0] * 4)
    state = jax.eval_shape(lambda: decode.begin(model, unstacked, *prompt, *nothing(4), facts, slots=40, kind="greedy"))
    lowered = advance.lower(model, unstacked, state, np.zeros(4, bool), 16, facts, every=16, kind="greedy")
    program = lowered.compile().as_text()
    weights = {x.shape for x in jax.tree.leaves((unstacked["layers"], unstacked["head"]))}
    shapes = {"f32[" + ",".join(map(str, shape)) + "]" for shape in weights | {state.cache.kv[0][0].shape}}
    assert all(shape in program for shape in shapes)
    moved = re.findall(r"= (f32\[[\d,]*\])\S* (?:copy|transpose|slice|dynamic-slice|gather)\(", program)
    assert not shapes & set(moved)


# where a row ends


def test_a_row_ends_before_the_end_of_text(complete, ids):
    free = ids(PROMPTS)
    end = free[1][10]
    assert len({row.index(end) if end in row else NEW for row in free}) > 1
    for row, found in zip(free, complete(PROMPTS, end_of_text=end)):
        ended = end in row
        assert found.tokens == (row[: row.index(end)] if ended else row)
        assert found.finish == ("end_of_text" if ended else "length")
        assert len(found.logprobs) == len(found.tokens)


def test_no_token_is_computed_after_all_rows_have_ended(model, unstacked, ids):
    prompt = PROMPTS[1]
    (free,) = ids([prompt])
    facts = draws([0], end_of_text=free[5])
    ends = free.index(free[5])
    state = begin(model, unstacked, *decode.pad_left([prompt]), *nothing(1), facts, slots=CONTEXT, kind="greedy")
    for ended in (False, True):
        state, *_ = advance(model, unstacked, state, np.array([ended]), 16, facts, every=16, kind="greedy")
        assert state.drawn_B == ends + 1


def test_a_caller_ends_a_row(complete, ids):
    free, calls = ids(PROMPTS[:2], max_tokens=12), []

    def over(b, tokens):
        calls.append((b, len(tokens)))
        return b == 1 and len(tokens) >= 5

    first, second = complete(PROMPTS[:2], max_tokens=12, over=over, every=4)
    assert (first.tokens, first.finish) == (free[0], "length")
    assert (second.tokens, second.finish) == (free[1][:5], "stop")
    assert calls == [(0, 1), (1, 1), (0, 5), (1, 5), (0, 9), (0, 12)]


def test_only_ids_of_the_vocabulary_are_drawn(ids):
    assert {id for row in ids(PROMPTS, SAMPLED, vocab_size=16) for id in row} == set(range(16))


# the context


def test_past_the_context_half_a_window_is_read_again(ids):
    prompt, context = PROMPTS[1], 12
    (found,) = ids([prompt], max_tokens=10, context_length=context)
    full = prompt + ids([prompt], max_tokens=4)[0]  # 8 and 4 fill the window
    assert found == full[8:] + ids([full[-6:]], max_tokens=6)[0]


def test_of_a_prompt_longer_than_the_context_half_a_window_is_read(ids):
    prompt = list(range(20))
    assert ids([prompt], max_tokens=3, context_length=12) == ids([prompt[-6:]], max_tokens=3)


def test_a_row_slides_when_it_is_full_itself(ids):
    together = ids(PROMPTS, SAMPLED, max_tokens=30, context_length=12)
    for b, prompt in enumerate(PROMPTS):
        assert ids([prompt], SAMPLED, seeds=[b], max_tokens=30, context_length=12) == [together[b]]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_rows_of_unequal_length_are_read_again_together(ids, monkeypatch, sampling):
    """Each at the moment when it was full, 32 rows were read 184 times for 400 tokens."""
    prompts, reads = [[n % 7 for n in range(length)] for length in range(1, 12)], []
    monkeypatch.setattr(decode, "_begin", lambda *a, **k: reads.append(a) or begin(*a, **k))
    together = ids(prompts, sampling, max_tokens=40, context_length=12)
    assert len(reads) <= 2 + 40 // 6
    monkeypatch.undo()
    for b, prompt in enumerate(prompts):
        assert ids([prompt], sampling, seeds=[b], max_tokens=40, context_length=12) == [together[b]]


def test_a_row_stops_when_it_is_full_itself(complete, ids):
    free = ids(PROMPTS)
    for prompt, row, found in zip(PROMPTS, free, complete(PROMPTS, context_length=12, beyond="stop")):
        assert (found.tokens, found.finish) == (row[: 12 - len(prompt)], "length")


@pytest.mark.parametrize("beyond", ["stop", "slide"])
def test_a_short_row_outlives_the_longest(complete, ids, beyond):
    """The cache has slots for the longest row: here 32, and the short one draws 60."""
    prompts, rest = [[n % 7 for n in range(60)], PROMPTS[1][:2]], {"max_tokens": 60, "context_length": 64}
    for over in (None, lambda row, tokens: row == 0):
        found = complete(prompts, beyond=beyond, over=over, **rest)
        assert [row.finish for row in found] == ["stop" if over else "length", "length"]
        assert [found[1].tokens] == ids(prompts[1:], beyond=beyond, **rest)
        assert over or [found[0].tokens] == ids(prompts[:1], beyond=beyond, **rest)


def test_draws_go_on_where_they_were_after_a_slide(model, unstacked, ids):
    prompt = PROMPTS[1]
    (found,) = ids([prompt], SAMPLED, seeds=[3], max_tokens=6, context_length=12)  # four, then the window is full
    half = decode.pad_left([[*prompt, *found[:4]][-6:]])
    for drawn, same in ((4, True), (0, False)):
        before = np.zeros((1, V), bool), np.array([drawn], np.int32)
        state = begin(model, unstacked, *half, *before, draws([3], SAMPLED), slots=6, kind="softmax")
        assert (state.token_B[0] == found[4]) == same


# prompts


def test_prompts_are_padded_on_the_left():
    tokens, start = decode.pad_left([[1, 2, 3], [4]])
    np.testing.assert_array_equal(tokens, [[1, 2, 3], [0, 0, 4]])
    np.testing.assert_array_equal(start, [0, 2])
    assert tokens.dtype == start.dtype == np.int32
    np.testing.assert_array_equal(decode.pad_left([[1], [2, 3]], length=3)[0], [[0, 0, 1], [0, 2, 3]])


def test_what_pads_does_not_matter(model, unstacked):
    tokens, start = decode.pad_left(PROMPTS)
    others = np.where(np.arange(tokens.shape[1]) < start[:, None], 7, tokens)
    assert np.any(others != tokens)
    prefill = jax.jit(model.prefill, static_argnums=3)
    sevens, zeros = (prefill(unstacked, padded, start, 8)[0] for padded in (others, tokens))
    np.testing.assert_array_equal(sevens, zeros)


@pytest.mark.parametrize("prompts", [[[]], [[1], []]])
def test_an_empty_prompt_is_an_error(prompts):
    with pytest.raises(ValueError, match="a prompt is empty; begin with the end-of-text token"):
        decode.pad_left(prompts)


# what is drawn


def test_generated_tokens_follow_the_models_softmax(model, params, ids):
    sampling, prompt = Sampling(1.2, top_k=20, top_p=0.9), PROMPTS[2]
    found = np.array(ids([prompt] * 4000, sampling, max_tokens=1))[:, 0]
    expected = distribution(uncached(model, params, [prompt])[0, len(prompt) - 1], sampling)
    assert np.sum(expected > 0.02) > 3
    assert_drawn_from(found, expected)


def test_the_penalty_meets_the_prompt_and_the_text(ids):
    (free,) = ids([PROMPTS[1]])
    (strong,) = ids([PROMPTS[1]], Sampling(0, repetition_penalty=1e6))
    assert len(set(free[:30])) < 30
    assert len(set(PROMPTS[1] + strong[:30])) == 7 + 30  # 1 is twice in the prompt


def test_a_context_that_the_model_does_not_have_is_refused(complete):
    """Its positions once were NaN, and the text the id 0, or what an argmax makes of NaN."""
    with pytest.raises(ConfigError, match="context_length is 81; the model has positions for 80"):
        complete(PROMPTS, context_length=CONTEXT + 1)
