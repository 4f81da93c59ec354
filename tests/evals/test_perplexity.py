import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm import config
from jaxlm.data import tokenizer_specs, write_tokens
from jaxlm.evals import perplexity
from jaxlm.evals.perplexity import count_words, evaluate_split
from jaxlm.model import gpt2
from jaxlm.model.losses import TokenSums, token_sums
from tests.tiny import resolved

V = 11


def batch(seed, rows, length):
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0, 3, (rows, length)) * (rng.uniform(size=(rows, length)) > 0.4)
    return {
        "logits": (2 * rng.normal(size=(rows, length, V))).astype(np.float32),
        "targets": rng.integers(0, V, (rows, length), dtype=np.int32),
        "weights": weights.astype(np.float32),
    }


def eval_step(batch):
    return token_sums(batch["logits"], batch["targets"], batch["weights"])


def evaluate(eval_step, batches, bytes_per_token):
    return perplexity.metrics(perplexity.sums(eval_step, batches), bytes_per_token)


BATCHES = [batch(0, 3, 5), batch(1, 1, 2), batch(2, 4, 7)]  # of uneven size and weight


def test_metrics_are_those_of_all_tokens_together():
    logits, targets, weights = (
        np.concatenate([b[name].reshape(-1, *b[name].shape[2:]) for b in BATCHES])
        for name in ("logits", "targets", "weights")
    )
    logits = np.float64(logits)
    nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(targets)), targets]
    loss = np.average(nll, weights=weights)
    metrics = evaluate(eval_step, BATCHES, bytes_per_token=3.5)
    assert metrics == pytest.approx(
        {
            "eval/loss": loss,
            "eval/perplexity": np.exp(loss),
            "eval/bits_per_byte": loss / np.log(2) / 3.5,
            "eval/accuracy": np.average(logits.argmax(-1) == targets, weights=weights),
        },
        rel=1e-5,
    )
    mean_of_means = np.mean([float(sums.nll / sums.weight) for sums in map(eval_step, BATCHES)])
    assert abs(mean_of_means - loss) > 1e-3  # so this data can tell the two apart


def test_uniform_bytes_are_eight_bits_a_byte():
    sums = token_sums(jnp.zeros((1, 4, 256)), jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4)))
    metrics = evaluate(lambda _: sums, [None, None], bytes_per_token=1.0)
    assert metrics["eval/bits_per_byte"] == pytest.approx(8.0)
    assert metrics["eval/perplexity"] == pytest.approx(256.0)


def test_a_padded_row_counts_for_nothing():
    padded = [{name: np.concatenate([x, np.zeros_like(x[:1])]) for name, x in b.items()} for b in BATCHES]
    expected = evaluate(eval_step, BATCHES, bytes_per_token=1.0)
    assert evaluate(eval_step, padded, bytes_per_token=1.0) == pytest.approx(expected, rel=1e-6)


def test_batches_may_come_one_at_a_time_and_in_any_order():
    one = evaluate(eval_step, iter(BATCHES), bytes_per_token=1.0)
    assert evaluate(eval_step, iter(BATCHES[::-1]), bytes_per_token=1.0) == pytest.approx(one, rel=1e-6)


def test_many_batches_are_added_in_float64():
    large = TokenSums(*[jnp.float32(2**24)] * 4)
    small = TokenSums(*[jnp.float32(0)] * 3, jnp.float32(1))  # lost if added to 2**24 in float32
    metrics = evaluate(lambda sums: sums, [large, *[small] * 1000], bytes_per_token=1.0)
    assert metrics["eval/loss"] == pytest.approx(2**24 / (2**24 + 1000), rel=1e-7)


@pytest.mark.parametrize(("nll", "perplexity"), [(1e6, math.exp(700)), (math.inf, math.inf), (math.nan, math.nan)])
def test_a_loss_out_of_hand_is_reported_and_does_not_raise(nll, perplexity):
    sums = TokenSums(*map(jnp.float32, (nll, nll, 0, 1)))
    metrics = evaluate(lambda _: sums, [None], bytes_per_token=1.0)
    np.testing.assert_equal((metrics["eval/loss"], metrics["eval/perplexity"]), (nll, perplexity))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_in_parts_are_those_of_the_whole_in_less_memory(tied, dtype):
    model = gpt2.build(resolved(model__context_length=64, model__tie_embeddings=tied, model__dtype=dtype).model)
    params = jax.tree.map(lambda x: 10 * x, model.init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 257, (2, 16, 64), dtype=np.int32)
    rows = {"inputs": ids[0], "targets": ids[1], "weights": rng.uniform(0, 2, (16, 64)).astype(np.float32)}

    def compiled(chunks):
        return jax.jit(functools.partial(perplexity.token_sums, model, chunks=chunks)).lower(params, rows).compile()

    whole, parts = compiled(1), compiled(8)
    np.testing.assert_allclose(parts(params, rows), whole(params, rows), rtol=1e-6)
    np.testing.assert_array_equal(compiled(0)(params, rows), whole(params, rows))
    logits = 16 * 64 * 257 * 4
    saved = whole.memory_analysis().temp_size_in_bytes - parts.memory_analysis().temp_size_in_bytes
    assert saved > logits / 2
    with pytest.raises(ValueError, match="64 positions do not divide into 7 chunks"):
        compiled(7)


# A whole split

T = 8
DOCUMENTS = ["a b\u3000c \u4e2d\u6587\n", "", " ", "x", "naïve café  🙂\u00a0", "\u4e2d\u6587\u4e2d \u6587"]


@pytest.fixture(scope="module")
def model():
    section = resolved(model__context_length=T).model
    model = gpt2.build(section)
    params = jax.tree.map(lambda x: 10 * x, model.init(jax.random.key(0)))  # so that context matters
    return model._replace(apply=jax.jit(model.apply)), params


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    tokenizer = tokenizer_specs.build("bytes")
    documents = [tokenizer.encode(document) for document in DOCUMENTS]
    return write_tokens(tmp_path_factory.mktemp("split") / "t.bin", documents, tokenizer)


def by_hand(model, params, tokens, stride):
    """nll and whether it was right, of each token, one window at a time."""
    nll, correct, begin, scored = [], [], 0, 0
    while scored < len(tokens) - 1:
        window = tokens[begin : begin + T]
        padded = np.zeros((1, T), np.int32)
        padded[0, : len(window)] = window
        logits = np.float64(model.apply(params, {"inputs": padded}))[0]
        for i in range(scored, min(begin + T, len(tokens) - 1)):
            row = logits[i - begin]
            nll.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[tokens[i + 1]])
            correct.append(row.argmax() == tokens[i + 1])
        scored = begin + T
        begin += stride
    return np.array(nll), np.array(correct)


@pytest.mark.parametrize("stride", [1, 3, T])
def test_sliding_windows_are_a_loop_by_hand(model, split, stride):
    tokenizer, (model, params) = tokenizer_specs.build("bytes"), model
    found = evaluate_split(
        model, params, tokenizer, split, config.default().data, batch_size=3, context_length=T, stride=stride
    )
    nll, correct = by_hand(model, params, np.asarray(split.tokens, np.int32), stride)
    words = sum(len(document.split()) for document in DOCUMENTS)
    assert len(nll) == found["tokens"] == len(split.tokens) - 1
    assert (found["words"], found["bytes"]) == (words, sum(len(document.encode()) for document in DOCUMENTS))
    assert found == pytest.approx(
        {
            "eval/loss": nll.mean(),
            "eval/perplexity": np.exp(nll.mean()),
            "eval/word_perplexity": np.exp(nll.sum() / words),
            "eval/bits_per_byte": nll.sum() / np.log(2) / found["bytes"],
            "eval/accuracy": correct.mean(),
            **{name: found[name] for name in ("tokens", "words", "bytes")},
        },
        rel=1e-4,
    )


@pytest.mark.parametrize(("pack", "stride"), [(False, 0), (False, 3), (True, 0)])
def test_a_batch_has_no_more_rows_than_there_are(model, split, monkeypatch, pack, stride):
    seen = []
    monkeypatch.setattr(perplexity, "tracked", lambda batches, *_: seen.append(batches[0]["inputs"].shape) or batches)
    section = config.override(config.default(), {"data.pack": pack}).data
    of = functools.partial(evaluate_split, *model, tokenizer_specs.build("bytes"), split, section, context_length=T)
    found = of(batch_size=10**12, stride=stride)  # of memory that no machine has
    assert found["eval/loss"] == pytest.approx(of(batch_size=1, stride=stride)["eval/loss"])
    assert seen[0][0] < len(split.tokens)


def test_a_stride_is_another_number_and_none_is_that_of_the_whole_context(model, split):
    def loss(stride):
        tokenizer = tokenizer_specs.build("bytes")
        return evaluate_split(
            *model, tokenizer, split, config.default().data, batch_size=3, context_length=T, stride=stride
        )["eval/loss"]

    assert loss(0) == loss(T) != loss(1)


@settings(max_examples=100)
@given(st.sampled_from(["bytes", "chars", "bpe:280"]), st.lists(st.sampled_from(DOCUMENTS)), st.integers(1, 9))
def test_words_are_those_of_the_text_wherever_it_is_cut(kinds, spec, documents, chunk):
    tokenizer = kinds[spec]
    ids = [np.append(tokenizer.encode(document), tokenizer.end_of_text) for document in documents]
    tokens = np.concatenate([np.empty(0, tokenizer.dtype), *ids]).astype(tokenizer.dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perplexity, "_CHUNK", chunk)
        assert count_words(tokens, tokenizer) == sum(len(document.split()) for document in documents)


@pytest.fixture(scope="module")
def kinds():
    return {spec: tokenizer_specs.build(spec, DOCUMENTS) for spec in ("bytes", "chars", "bpe:280")}


def test_a_text_without_words_has_no_word_perplexity(model, tmp_path):
    tokenizer = tokenizer_specs.build("bytes")
    blank = write_tokens(tmp_path / "t.bin", [tokenizer.encode("\n \n")], tokenizer)
    found = evaluate_split(*model, tokenizer, blank, config.default().data, batch_size=3, context_length=T)
    assert found["words"] == 0 and "eval/word_perplexity" not in found


def test_of_a_few_words_too_bits_are_all_nats_over_all_bytes(model, tmp_path):
    """As nats are over all words. The first token, which nothing predicts, was once counted as a predicted one."""
    tokenizer = tokenizer_specs.build("bytes")
    short = write_tokens(tmp_path / "t.bin", [tokenizer.encode("ab")], tokenizer)
    found = evaluate_split(*model, tokenizer, short, config.default().data, batch_size=3, context_length=T)
    assert found["tokens"] == found["bytes"] == 2
    assert found["eval/bits_per_byte"] == pytest.approx(found["eval/loss"] * 2 / np.log(2) / 2)
    assert found["eval/word_perplexity"] == pytest.approx(np.exp(found["eval/loss"] * 2))
