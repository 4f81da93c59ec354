"""How probable texts are does not depend on what else is asked for, nor does it take the memory of all."""

import tracemalloc

import jax
import numpy as np
import pytest

from jaxlm.evals import likelihoods
from jaxlm.model import gpt2
from tests.tiny import resolved

T = 64


@pytest.fixture(scope="module")
def model():
    return gpt2.build(resolved(model__context_length=T).model)


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


@pytest.fixture(scope="module")
def scored(model, params):
    """(sequences, batch_size) -> nats and greedy of their last two ids."""
    return lambda rows, size=2, **more: likelihoods.of_tails(model, params, rows, [2] * len(rows), T, size, **more)


def sequences(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 257, n).tolist() for n in lengths]


def test_others_in_the_list_change_nothing(scored):
    rows = sequences(3, T + 1, 17, 18, 5, 33, 4)
    nats, greedy = scored(rows)
    alone = [scored([row], 1) for row in rows]
    np.testing.assert_allclose(nats, [found[0] for found, _ in alone], atol=1e-6, rtol=1e-6)
    assert greedy.tolist() == [bool(found[0]) for _, found in alone]


def test_a_batch_is_as_long_as_its_own_longest(scored, monkeypatch):
    """All were once as long as the longest of all: one long text among short ones cost as much as a list of it."""
    shapes, of_rows = [], likelihoods._of_rows

    def seen(model, params, batch, *rest):
        shapes.append(batch["inputs"].shape)
        return of_rows(model, params, batch, *rest)

    monkeypatch.setattr(likelihoods, "_of_rows", seen)
    scored(sequences(3, 17, T + 1, 18, 5, 33, 4))
    assert shapes == [(2, T), (2, 32), (2, 16), (2, 16)]


@pytest.mark.parametrize("chunks", [0, 2, 4, 64])
def test_chunks_change_nothing(scored, chunks):
    rows = sequences(3, T + 1, 17, 18, 5, 33, 4)
    wanted, found = scored(rows), scored(rows, chunks=chunks)
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-6, rtol=1e-6)
    assert found[1].tolist() == wanted[1].tolist()


def test_chunks_of_a_batch_are_no_longer_than_those_of_the_context(model, params):
    """The logits of all positions were once in memory together, whatever model.loss_chunks said."""
    seen, logits = [], model.logits

    def counted(params, hidden):
        seen.append(hidden.shape[1])
        return logits(params, hidden)

    for n in (T + 1, 20):
        likelihoods.of_tails(model._replace(logits=counted), params, sequences(n), [2], T, 1, chunks=4)
    assert seen == [T // 4, T // 4]


def test_parts_of_a_power_of_two_where_chunks_do_not_divide_it():
    assert [likelihoods._parts(512, n, 1000) for n in (0, 1, 2, 5, 10)] == [1, 1, 2, 4, 8]
    assert [likelihoods._parts(1000, n, 1000) for n in (0, 1, 5)] == [1, 1, 5]


def test_a_prompt_with_many_labels_is_no_list_for_each(monkeypatch):
    held = []

    def of_tails(model, params, sequences, *_):
        held.append(tracemalloc.get_traced_memory()[0])
        return np.zeros(len(sequences)), None

    monkeypatch.setattr(likelihoods, "of_tails", of_tails)
    prompts = [np.arange(1000, 1500) + n for n in range(20)]
    rows = [(prompt, np.arange(3)) for prompt in prompts for _ in range(50)]
    tracemalloc.start()
    try:
        likelihoods.of_completions(None, None, 0, rows, 1024, 8)
    finally:
        tracemalloc.stop()
    assert held[0] < 2.5 * 4 * 1000 * 504  # ids of 4 bytes; a list takes 8 for each and 28 for its number
