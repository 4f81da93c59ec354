"""Tables cut and grown at their end, and nothing else touched."""

import jax
import numpy as np
import pytest

from jaxlm import config
from jaxlm.model import gpt2
from jaxlm.model.resize import resize
from tests.tiny import assert_same_bits, leaves, tiny

KEY = jax.random.key(7)


def section(tied, vocab_size=130, context_length=16, **changes):
    sizes = dict(model__vocab_size=vocab_size, model__context_length=context_length, model__tie_embeddings=tied)
    return config.resolve(tiny(**sizes, **changes)).model


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def tied(request):
    return request.param


@pytest.fixture(scope="module")
def params(tied):
    return jax.jit(gpt2.build(section(tied)).init)(jax.random.key(1))


def logits(params, section, tokens):
    return np.asarray(gpt2.build(section).apply(params, {"inputs": tokens}))


@pytest.mark.parametrize(("vocab_size", "context_length"), [(100, 8), (128, 20), (140, 16), (300, 20)])
def test_the_result_has_the_shapes_of_the_other_model_and_its_padding_is_zero(tied, params, vocab_size, context_length):
    new = section(tied, vocab_size, context_length)
    out, _ = resize(params, section(tied), new, KEY)
    shapes = gpt2.shapes(new)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), out) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    ids = [out["wte"]["embedding"]] + ([] if tied else [out["lm_head"]["kernel"].T])
    assert all(not np.any(table[vocab_size:]) and np.all(np.any(table[:vocab_size], axis=1)) for table in ids)


def test_the_same_sizes_change_nothing_and_say_nothing(tied, params):
    out, said = resize(params, section(tied), section(tied), KEY)
    assert_same_bits(out, params)
    assert said == []


def test_logits_of_what_both_models_know_stay_as_they_were(tied, params):
    tokens = np.arange(8)[None] * 9
    before = logits(params, section(tied), tokens)
    for vocab_size, context_length in ((100, 8), (140, 20)):
        new = section(tied, vocab_size, context_length)
        after = logits(resize(params, section(tied), new, KEY)[0], new, tokens)
        np.testing.assert_allclose(after[..., :100], before[..., :100], rtol=1e-5, atol=1e-6)


def test_new_ids_get_the_mean_of_the_old_ones(tied, params):
    out, said = resize(params, section(tied), section(tied, vocab_size=140), KEY)
    for path, axis in (("wte/embedding", 0), ("lm_head/kernel", 1)):
        if path in leaves(out):
            old, new = (np.moveaxis(leaves(tree)[path], axis, 0) for tree in (params, out))
            np.testing.assert_allclose(new[130:140], np.tile(old[:130].mean(0), (10, 1)), rtol=1e-4, atol=1e-7)
    assert said == ["token ids grown from 130 to 140: 10 added, each with the mean of the old ones"]


def test_new_positions_are_drawn_from_the_key(tied, params):
    def grown(key):
        return leaves(resize(params, section(tied), section(tied, context_length=400), key)[0])["wpe/embedding"]

    first, again, other = grown(KEY), grown(KEY), grown(jax.random.key(8))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first[:16], leaves(params)["wpe/embedding"])
    assert np.all(first[16:] != other[16:])
    assert first[16:].std() == pytest.approx(0.02, rel=0.05) and abs(first[16:].mean()) < 0.002


def test_what_is_cut_is_said(tied, params):
    said = resize(params, section(tied), section(tied, 100, 8), KEY)[1]
    assert said == [
        "positions cut from 16 to 8: the last 8 are dropped",
        "token ids cut from 130 to 100: the last 30 are dropped",
    ]


def test_another_type_of_parameters_is_kept(tied, params):
    half = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    out, _ = resize(half, section(tied), section(tied, 140, 20), KEY)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(out)} == {"bfloat16"}
