import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import tree
from jaxlm.errors import ConfigError
from jaxlm.model import attention, losses

V, T = 50, 24  # as in conftest
KEY = jax.random.key(7)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time


def tokens(rows=2, length=T, seed=0):
    return np.random.default_rng(seed).integers(0, V, (rows, length), dtype=np.int32)


def batch(rows=2, length=T, seed=0):
    ids = tokens(rows, length + 1, seed)
    weights = np.random.default_rng(seed + 1).uniform(0, 2, (rows, length)).astype(np.float32)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:], "weights": weights}


@pytest.fixture(scope="module")
def logits(model, params):
    """(batch) -> logits, compiled once a shape."""
    return jit(functools.partial(model.apply, params))


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


def test_gpt2_small_has_its_number_of_parameters(build):
    small = build(num_layers=12, num_heads=12, embed_dim=768, context_length=1024, vocab_size=50257)
    padding = (50304 - 50257) * 768
    assert tree.size(jax.eval_shape(small.init, KEY)) - padding == 124_439_808


@pytest.mark.parametrize("changes", [{"unroll": True}, {"remat": "block"}, {"remat": "dots"}, {"dtype": "bfloat16"}])
def test_what_is_only_speed_keeps_the_parameters(model, build, changes):
    expected, got = jax.eval_shape(model.init, KEY), jax.eval_shape(build(**changes).init, KEY)
    assert expected == got


def test_initialisation_is_hugging_faces(build):
    L = 4
    params = jit(build(num_layers=L, embed_dim=64, vocab_size=256, context_length=64).init)(KEY)
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


def test_layers_are_initialised_apart(model):
    kernel = jit(model.init)(KEY)["h"]["attn"]["c_attn"]["kernel"]
    assert np.any(kernel[0] != kernel[1])


def test_parameters_stay_float32_or_become_what_is_asked_for(build):
    for dtype in ("float32", "bfloat16"):
        shapes = jax.eval_shape(build(dtype="bfloat16", param_dtype=dtype).init, KEY)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {dtype}


def test_an_unknown_vocabulary_is_an_error(build):
    with pytest.raises(ConfigError, match="model.vocab_size is 0 and no tokenizer has set it"):
        build(vocab_size=0)


# one value, however it is computed


@functools.cache
def value_and_gradient(build, params, dropout, **changes):
    model, whole = build(**changes), batch()

    @jit
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
@pytest.mark.parametrize("changes", [{"unroll": True}, {"remat": "dots"}, {"remat": "block"}], ids=str)
def test_loops_and_remat_give_the_same_loss_and_gradients(build, hashed, dropout, changes):
    loss, gradient = value_and_gradient(build, hashed, dropout)
    other_loss, other_gradient = value_and_gradient(build, hashed, dropout, **changes)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    for path, a, b in zip(tree.paths(gradient), jax.tree.leaves(gradient), jax.tree.leaves(other_gradient)):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-6 * np.abs(a).max(), err_msg=path)
        assert np.abs(a).max() > 0, path


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
    out = jit(model.apply)(changed, batch())
    assert out.shape == (2, T, V)
    np.testing.assert_array_equal(out, logits(batch()))


def test_dropout_is_drawn_anew_by_key(model, params, logits):
    @jit
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
    out = jit(model.apply)(params, {"inputs": np.full((2, T), D, np.int32)}, dropout=0.5, key=KEY)[..., :D]
    sums = 1 + np.sum(np.diff(np.sort(out, axis=-1)) > 1e-3, axis=-1)  # different sums of what was kept, by token
    assert 16 < sums.max() <= 32, "of five masks of their own there are 32; two that agree leave 16"


def test_dropout_without_a_key_is_an_error(model, params):
    with pytest.raises(ValueError, match="dropout needs a key"):
        model.apply(params, batch(), dropout=0.1)


# what may depend on what


@pytest.mark.parametrize("block", [8, 128])
def test_a_token_changes_no_earlier_logits(model, params, monkeypatch, block):
    monkeypatch.setattr(attention, "BLOCK", block)
    apply = jit(functools.partial(model.apply, params))
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
    apply = jit(functools.partial(model.apply, params))
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
    params = jit(model.init)(KEY)
    exact, rounded = (jit(build(dtype=dtype).apply)(params, batch()) for dtype in ("float32", "bfloat16"))
    assert rounded.dtype == jnp.float32
    difference = np.std(rounded - exact) / np.std(exact)
    assert 1e-4 < difference < 0.02  # it computes in bfloat16, and not wrongly


# the reference


def to_hugging_face(torch, params):
    """The state of a GPT2LMHeadModel: its Conv1D kernels are [in, out] like ours."""
    state = {}
    for path, leaf in zip(tree.paths(params), jax.tree.leaves(params)):
        leaf = torch.tensor(np.asarray(leaf))
        *module, kind = path.split("/")
        kind = "bias" if kind == "bias" else "weight"
        if module[0] == "h":
            for i, layer in enumerate(leaf):
                state[".".join(["transformer.h", str(i), *module[1:], kind])] = layer
        elif module[0] == "wte":
            state["transformer.wte.weight"] = state["lm_head.weight"] = leaf[:V]
        else:
            state[".".join(["transformer", *module, kind])] = leaf
    return state


@pytest.mark.parametrize(
    ("layers", "heads", "width", "rows", "length"), [(2, 2, 16, 3, 24), (1, 4, 32, 2, 11)], ids=["2x16", "1x32"]
)
def test_logits_are_those_of_transformers_gpt2(build, layers, heads, width, rows, length):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = build(num_layers=layers, num_heads=heads, embed_dim=width)
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, KEY)
    params = jax.tree.map(
        lambda x: np.float32(0.3 * rng.normal(size=x.shape) + (x.shape[-1:] == (width,)) * 0.1), shapes
    )
    facts = transformers.GPT2Config(
        vocab_size=V,
        n_positions=T,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    reference = transformers.GPT2LMHeadModel(facts).eval()
    reference.load_state_dict(to_hugging_face(torch, params), strict=True)
    ids = tokens(rows, length)
    with torch.no_grad():
        expected = reference(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    ours = jit(model.apply)(params, {"inputs": ids})
    # they agree to 1e-6; the exact GELU in place of the tanh one would be off by 1e-4
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
