import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config, tree
from jaxlm.errors import ConfigError
from jaxlm.model import attention, gpt2, losses
from tests.model.conftest import SMALL

V, T = 50, 24  # as in conftest
KEY = jax.random.key(7)


def tokens(rows=2, length=T, seed=0):
    return np.random.default_rng(seed).integers(0, V, (rows, length), dtype=np.int32)


def batch(rows=2, length=T, seed=0):
    ids = tokens(rows, length + 1, seed)
    weights = np.random.default_rng(seed + 1).uniform(0, 2, (rows, length)).astype(np.float32)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:], "weights": weights}


@pytest.fixture(scope="module")
def logits(model, params):
    """(batch) -> logits, compiled once a shape."""
    return jax.jit(functools.partial(model.apply, params))


# parameters


def test_parameters_are_gpt2s_with_layers_on_axis_0(model):
    shapes = jax.eval_shape(model.init, KEY)
    L, D, F = 2, 16, 64
    assert {path: leaf.shape for path, leaf in zip(tree.paths(shapes), jax.tree.leaves(shapes))} == {
        "wte/embedding": (128, D),  # the vocabulary is padded to a multiple of 128
        "wpe/embedding": (T, D),
        "h/ln_1/scale": (L, D),
        "h/ln_1/bias": (L, D),
        "h/attn/c_attn/kernel": (L, D, 3 * D),
        "h/attn/c_attn/bias": (L, 3 * D),
        "h/attn/c_proj/kernel": (L, D, D),
        "h/attn/c_proj/bias": (L, D),
        "h/ln_2/scale": (L, D),
        "h/ln_2/bias": (L, D),
        "h/mlp/c_fc/kernel": (L, D, F),
        "h/mlp/c_fc/bias": (L, F),
        "h/mlp/c_proj/kernel": (L, F, D),
        "h/mlp/c_proj/bias": (L, D),
        "ln_f/scale": (D,),
        "ln_f/bias": (D,),
    }


def test_variations_change_the_shapes_that_they_name_and_no_others(model, build):
    def shapes(model):
        out = jax.eval_shape(model.init, KEY)
        return {path: leaf.shape for path, leaf in zip(tree.paths(out), jax.tree.leaves(out))}

    narrow = {"h/mlp/c_fc/kernel": (2, 16, 24), "h/mlp/c_fc/bias": (2, 24), "h/mlp/c_proj/kernel": (2, 24, 16)}
    assert shapes(build(feed_forward_dim=24)) == shapes(model) | narrow
    assert shapes(build(feed_forward_dim=64)) == shapes(model)
    assert shapes(build(tie_embeddings=False)) == shapes(model) | {"lm_head/kernel": (16, 128)}
    others = dict(activation="silu", norm_epsilon=1e-3, scale_attention=False, scale_attention_by_layer=True)
    assert shapes(build(**others)) == shapes(model)


def test_gpt2_small_has_its_number_of_parameters(build):
    small = build(num_layers=12, num_heads=12, embed_dim=768, context_length=1024, vocab_size=50257)
    padding = (50304 - 50257) * 768
    assert tree.size(jax.eval_shape(small.init, KEY)) - padding == 124_439_808


@pytest.mark.parametrize("changes", [{"unroll": False}, {"remat": "block"}, {"remat": "dots"}, {"dtype": "bfloat16"}])
def test_what_is_only_speed_keeps_the_parameters(model, build, changes):
    expected, got = jax.eval_shape(model.init, KEY), jax.eval_shape(build(**changes).init, KEY)
    assert expected == got


def test_initialisation_is_hugging_faces(build):
    L = 4
    params = jax.jit(build(num_layers=L, embed_dim=64, vocab_size=256, context_length=64, tie_embeddings=False).init)(
        KEY
    )
    residual = 0.02 / (2 * L) ** 0.5
    for path, leaf in zip(tree.paths(params), jax.tree.leaves(params)):
        if path.endswith("bias"):
            assert not np.any(leaf), path
        elif path.endswith("scale"):
            assert np.all(leaf == 1), path
        else:
            stddev = residual if "c_proj" in path else 0.02
            np.testing.assert_allclose(np.std(leaf), stddev, rtol=5 / (2 * leaf.size) ** 0.5, err_msg=path)
            assert abs(np.mean(leaf)) < 5 * stddev / leaf.size**0.5, path


def test_what_pads_the_vocabulary_is_initialised_to_zero(build):
    params = jax.jit(build(tie_embeddings=False).init)(KEY)
    for table_VD in (params["wte"]["embedding"], params["lm_head"]["kernel"].T):
        assert np.all(np.any(table_VD[:V] != 0, axis=1)) and not np.any(table_VD[V:])


def test_layers_are_initialised_apart(model):
    kernel = jax.jit(model.init)(KEY)["h"]["attn"]["c_attn"]["kernel"]
    assert np.any(kernel[0] != kernel[1])


def test_parameters_stay_float32_or_become_what_is_asked_for(build):
    for dtype in ("float32", "bfloat16"):
        shapes = jax.eval_shape(build(dtype="bfloat16", param_dtype=dtype).init, KEY)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {dtype}


def test_only_what_trains_by_cudnns_attention_needs_a_gpu(model, params):
    section = config.resolve(
        config.override(
            config.default(), {f"model.{name}": value for name, value in SMALL.items()} | {"model.attention": "cudnn"}
        )
    ).model
    inputs = {"inputs": tokens()}
    assert jax.tree.map(jnp.shape, gpt2.shapes(section)) == jax.tree.map(jnp.shape, params)
    with pytest.raises(ConfigError, match="model.attention='cudnn' can't serve here"):
        jax.eval_shape(gpt2.build(section).apply, params, inputs)
    read = gpt2.build(section, strict=False)
    np.testing.assert_array_equal(jax.jit(read.apply)(params, inputs), jax.jit(model.apply)(params, inputs))
    for prefill, unstack in ((built.prefill, built.unstack) for built in (gpt2.build(section), read)):
        assert np.all(np.isfinite(prefill(unstack(params), tokens(), np.zeros(2, np.int32), T)[0]))


def test_an_unknown_vocabulary_is_an_error(build):
    with pytest.raises(ConfigError, match="model.vocab_size is 0 and no tokenizer has set it"):
        build(vocab_size=0)


# one value, however it is computed


@functools.cache
def value_and_gradient(build, params, dropout, **changes):
    model, whole = build(**changes), batch()

    @jax.jit
    def compute(params, rate):
        def loss(params):
            logits = model.apply(params, whole, dropout=rate if dropout else None, key=KEY)
            sums = losses.token_sums(logits, whole["targets"], whole["weights"])
            return sums.objective / sums.weight

        return jax.value_and_grad(loss)(params)

    return compute(params.tree, jnp.float32(dropout))


class Hashed:
    """Parameters as a key of the cache, by identity."""

    def __init__(self, tree):
        self.tree = tree


@pytest.fixture(scope="module")
def hashed(params):
    return Hashed(params)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("changes", [{"unroll": False}, {"remat": "dots"}, {"remat": "block"}], ids=str)
def test_loops_and_remat_give_the_same_loss_and_gradients(build, hashed, dropout, changes):
    loss, gradient = value_and_gradient(build, hashed, dropout)
    other_loss, other_gradient = value_and_gradient(build, hashed, dropout, **changes)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    for path, a, b in zip(tree.paths(gradient), jax.tree.leaves(gradient), jax.tree.leaves(other_gradient)):
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-6 * np.abs(a).max(), err_msg=path)
        assert np.abs(a).max() > 0, path


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_rows_are_float32_scatters_and_positions_are_a_slice(build, params, packed):
    rows = {"inputs": tokens()}
    if packed:
        rows |= {name: np.zeros_like(tokens()) for name in ("positions", "segment_ids")}

    def total(params):
        return build(dtype="bfloat16").hidden(params, rows).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(total)).lower(params).as_text()
    scattered = re.findall(r"stablehlo.scatter.*?-> tensor<[0-9x]*(\w+)>", text, re.DOTALL)
    assert scattered == ["f32"] * (1 + packed)
    assert text.count('"stablehlo.gather"') == 1 + packed


def test_one_product_for_queries_keys_and_values_is_three(build, model, params):
    in_one = gpt2.ON_ONE_DEVICE._replace(products=1)
    fields = {f"model.{name}": value for name, value in SMALL.items()}
    section = config.resolve(config.override(config.default(), fields)).model
    one, inputs = gpt2.build(section, in_one), {"inputs": tokens()}
    np.testing.assert_allclose(one.apply(params, inputs), model.apply(params, inputs), rtol=1e-5, atol=1e-5)


def test_of_an_activation_its_argument_and_its_value_are_kept(model, params):
    """For a backward pass: each is the largest thing in a layer, and autodiff would keep a third."""
    inputs = {"inputs": tokens()}
    backward = jax.eval_shape(lambda params: jax.vjp(lambda p: model.hidden(p, inputs), params)[1], params)
    L, F = SMALL["num_layers"], 4 * SMALL["embed_dim"]
    assert [x.shape for x in jax.tree.leaves(backward)].count((L, *inputs["inputs"].shape, F)) == 2


def test_dropout_changes_the_loss(build, hashed):
    assert abs(value_and_gradient(build, hashed, 0.0)[0] - value_and_gradient(build, hashed, 0.3)[0]) > 1e-3


def test_padding_of_the_vocabulary_gets_no_gradient(build, hashed):
    _, gradient = value_and_gradient(build, hashed, 0.0)
    rows = np.abs(gradient["wte"]["embedding"]).max(axis=1)
    assert np.all(rows[:V] > 0) and np.all(rows[V:] == 0)


def test_padding_of_the_vocabulary_never_shows(model, params, logits):
    changed = jax.tree.map(lambda x: x, params)
    changed["wte"]["embedding"] = changed["wte"]["embedding"].copy()
    changed["wte"]["embedding"][V:] = 1e6
    out = jax.jit(model.apply)(changed, batch())
    assert out.shape == (2, T, V)
    np.testing.assert_array_equal(out, logits(batch()))


def test_dropout_is_drawn_anew_by_key(model, params, logits):
    @jax.jit
    def apply(key, rate):
        return model.apply(params, batch(), dropout=rate, key=key)

    np.testing.assert_array_equal(apply(KEY, 0.3), apply(KEY, 0.3))
    assert np.any(apply(KEY, 0.3) != apply(jax.random.key(8), 0.3))
    np.testing.assert_allclose(apply(KEY, 0.0), logits(batch()), rtol=1e-4, atol=1e-4)


def test_every_dropout_draws_a_mask_of_its_own(build):
    D = 64
    model = build(embed_dim=D, vocab_size=D + 1)
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), jax.eval_shape(model.init, KEY))
    params["ln_f"]["scale"] += 1
    params["wte"]["embedding"][:D] = np.eye(D)  # logits are the last norm's output
    # what is dropped is constant: 1 of the embedding, 3 and 9 of one layer's branches, 27 and 81 of the other's
    params["wte"]["embedding"][D] = 1
    params["h"]["attn"]["c_proj"]["bias"] += np.array([[3], [27]])
    params["h"]["mlp"]["c_proj"]["bias"] += np.array([[9], [81]])
    out = jax.jit(model.apply)(params, {"inputs": np.full((2, T), D, np.int32)}, dropout=0.5, key=KEY)[..., :D]
    sums = 1 + np.sum(np.diff(np.sort(out, axis=-1)) > 1e-3, axis=-1)  # different sums of what was kept, by token
    assert 16 < sums.max() <= 32, "of five masks of their own there are 32; two that agree leave 16"


def test_dropout_without_a_key_is_an_error(model, params):
    with pytest.raises(ValueError, match="dropout needs a key"):
        model.apply(params, batch(), dropout=0.1)


# what may depend on what


@pytest.mark.parametrize("block", [8, 128])
def test_a_token_changes_no_earlier_logits(model, params, monkeypatch, block):
    monkeypatch.setattr(attention, "BLOCK", block)
    apply = jax.jit(functools.partial(model.apply, params))
    ids = tokens()
    before = np.asarray(apply({"inputs": ids}))
    for t in (0, 5, 8, T - 1):
        changed = ids.copy()
        changed[:, t] = (changed[:, t] + 1) % V
        after = np.asarray(apply({"inputs": changed}))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert np.all(np.any(after[:, t:] != before[:, t:], axis=-1))


def test_rows_do_not_see_each_other(logits):
    ids = tokens()
    changed = ids.copy()
    changed[1] = (changed[1] + 1) % V
    np.testing.assert_array_equal(logits({"inputs": changed})[0], logits({"inputs": ids})[0])


def packed(first, second):
    """Two documents in one row, with positions that start again."""
    lengths = [first.shape[1], second.shape[1]]
    ids = np.repeat([0, 1], lengths)[None].repeat(len(first), 0)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].repeat(len(first), 0)
    return {"inputs": np.concatenate([first, second], 1), "segment_ids": ids, "positions": positions}


@pytest.mark.parametrize("block", [8, 128])
def test_packed_documents_are_as_if_alone(model, params, logits, monkeypatch, block):
    first, second = tokens(2, 9, seed=1), tokens(2, 15, seed=2)
    alone = np.concatenate([logits({"inputs": first}), logits({"inputs": second})], axis=1)
    scale = np.abs(alone).max()
    monkeypatch.setattr(attention, "BLOCK", block)
    apply = jax.jit(functools.partial(model.apply, params))
    row = packed(first, second)
    np.testing.assert_allclose(apply(row), alone, rtol=0, atol=1e-5 * scale)
    # so near is not by chance: attention that leaks, or positions that run on, are far off
    leaks = apply({**row, "segment_ids": np.zeros_like(row["segment_ids"])})
    runs_on = apply({"inputs": row["inputs"], "segment_ids": row["segment_ids"]})
    assert np.abs(leaks - alone)[:, 9:].max() > 1e-2 * scale
    assert np.abs(runs_on - alone)[:, 9:].max() > 1e-2 * scale


def test_positions_default_to_counting_from_zero(logits):
    counted = np.arange(T)[None].repeat(2, 0)
    np.testing.assert_array_equal(logits({"inputs": tokens(), "positions": counted}), logits({"inputs": tokens()}))
    backwards = logits({"inputs": tokens(), "positions": counted[:, ::-1]})
    assert np.all(np.any(backwards != logits({"inputs": tokens()}), axis=-1))


def test_more_tokens_than_the_context_are_an_error(model, params):
    with pytest.raises(ValueError, match="25 tokens are longer than the context of 24"):
        model.apply(params, {"inputs": tokens(length=25)})


@pytest.mark.parametrize("bad", [V, 127, 128, 10**6, -1, -V])
def test_an_id_out_of_range_gives_nan(logits, bad):
    ids = tokens(2)
    ids[1, 5] = bad
    out = np.asarray(logits({"inputs": ids}))
    assert np.isnan(out[1, 5:]).all() and np.isfinite(out[0]).all()


@pytest.mark.parametrize("bad", [T, -1])
def test_a_position_out_of_range_gives_nan(logits, bad):
    positions = np.arange(T)[None].repeat(2, 0)
    positions[1, -1] = bad
    out = np.asarray(logits({"inputs": tokens(2), "positions": positions}))
    assert np.isnan(out[1, -1]).all() and np.isfinite(out[0]).all()


def test_bfloat16_is_near_and_gives_float32_logits(model, build):
    params = jax.jit(model.init)(KEY)
    exact, rounded = (jax.jit(build(dtype=dtype).apply)(params, batch()) for dtype in ("float32", "bfloat16"))
    assert rounded.dtype == jnp.float32
    difference = np.std(rounded - exact) / np.std(exact)
    assert 1e-4 < difference < 0.02  # it computes in bfloat16, and not wrongly


# the variations that Hugging Face's GPT2Config knows; what transformers makes of them is in test_huggingface


def scaled_queries(params, scale_L):
    """Parameters whose queries are so many times larger, by layer."""
    out = jax.tree.map(np.array, params)
    D = out["wte"]["embedding"].shape[1]
    for leaf in out["h"]["attn"]["c_attn"].values():
        leaf[..., :D] *= np.reshape(scale_L, (-1,) + (1,) * (leaf.ndim - 1))
    return out


@pytest.mark.parametrize(
    ("changes", "scale_L"),
    [
        ({"scale_attention": False}, [8**0.5, 8**0.5]),
        ({"scale_attention_by_layer": True}, [1, 1 / 2]),
        ({"scale_attention": False, "scale_attention_by_layer": True}, [8**0.5, 8**0.5 / 2]),
    ],
)
def test_scales_of_attention_are_as_if_queries_were_scaled(build, params, logits, changes, scale_L):
    out = jax.jit(build(**changes).apply)(params, batch())
    expected = jax.jit(build().apply)(scaled_queries(params, scale_L), batch())
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert np.abs(out - logits(batch())).max() > 1e-2 * np.abs(expected).max()


def test_a_head_of_its_own_that_is_the_embedding_is_a_tied_one(build, params, logits):
    untied = {**params, "lm_head": {"kernel": params["wte"]["embedding"].T}}
    out = jax.jit(build(tie_embeddings=False).apply)(untied, batch())
    np.testing.assert_allclose(out, logits(batch()), rtol=0, atol=1e-5 * np.abs(out).max())
    doubled = {**untied, "lm_head": {"kernel": 2 * untied["lm_head"]["kernel"]}}
    np.testing.assert_array_equal(jax.jit(build(tie_embeddings=False).apply)(doubled, batch()), 2 * out)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_in_bfloat16_are_not_rounded(build, tied):
    model = build(dtype="bfloat16", tie_embeddings=tied)
    out = jax.jit(lambda key: model.apply(model.init(key), batch()))(KEY)
    assert np.mean(out != out.astype(jnp.bfloat16)) > 0.5


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("gelu_tanh", lambda x: x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))),
        ("gelu", lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / 2**0.5))),
        ("relu", lambda x: np.maximum(x, 0)),
        ("silu", lambda x: x / (1 + np.exp(-x))),
    ],
)
def test_activations_are_their_formulas(name, formula):
    x = np.linspace(-4, 4, 41)
    np.testing.assert_allclose(gpt2.ACTIVATIONS[name](jnp.float32(x)), formula(x), rtol=0, atol=1e-6)


def test_activation_width_and_epsilon_are_those_asked_for(build):
    epsilon, rng = 0.5, np.random.default_rng(0)
    model = build(num_layers=1, feed_forward_dim=24, activation="relu", norm_epsilon=epsilon)
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), jax.eval_shape(model.init, KEY))
    table_VD, fc, proj = params["wte"]["embedding"], params["h"]["mlp"]["c_fc"], params["h"]["mlp"]["c_proj"]
    for array in (table_VD, fc["kernel"], fc["bias"], proj["kernel"]):  # attention stays zero
        array += rng.normal(size=array.shape)
    params["h"]["ln_2"]["scale"] += 1
    params["ln_f"]["scale"] += 1

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)

    x_BTD = table_VD[tokens()]
    y_BTD = x_BTD + np.maximum(norm(x_BTD) @ fc["kernel"][0] + fc["bias"][0], 0) @ proj["kernel"][0]
    out = jax.jit(model.apply)(params, {"inputs": tokens()})
    np.testing.assert_allclose(out, norm(y_BTD) @ table_VD[:V].T, rtol=0, atol=1e-5 * np.abs(out).max())
