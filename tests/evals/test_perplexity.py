import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.evals.perplexity import evaluate
from jaxlm.model.losses import TokenSums, token_sums

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
