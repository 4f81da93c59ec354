import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import ConfigError
from jaxlm.model import attention

B, T, H, K = 2, 13, 2, 8  # T is no multiple of a block
SEGMENTS = np.array([[0] * 3 + [1] * 7 + [2] * 3, [3] * 13])
KEY = jax.random.key(0)


@pytest.fixture
def blocks(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 8)


def qkv(seed=0, dtype=np.float32, length=T):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(B, length, H, K)), dtype) for _ in "qkv")


def allowed(segments):
    """bool[B, T, S]: what may be attended to."""
    before = np.tril(np.ones((T, T), bool))[None]
    return np.repeat(before, B, 0) if segments is None else before & (segments[:, :, None] == segments[:, None, :])


def weights(q, k, segments):
    """softmax(q k^T / sqrt(K)), float64[B, H, T, S]."""
    scores = np.einsum("bthk,bshk->bhts", np.float64(q), np.float64(k)) / np.sqrt(K)
    scores = np.where(allowed(segments)[:, None], scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True)


def plain(q, k, v, segments=None):
    return np.einsum("bhts,bshk->bthk", weights(q, k, segments), np.float64(v))


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one segment", "three segments"])
def test_blocks_give_plain_attention(blocks, segments):
    q, k, v = qkv()
    np.testing.assert_allclose(attention.causal(q, k, v, segment_ids_BT=segments), plain(q, k, v, segments), atol=1e-6)


@pytest.mark.parametrize("length", [1, 7, 8, 9])
def test_any_length_gives_plain_attention(blocks, length):
    q, k, v = qkv()
    out = attention.causal(q[:, :length], k[:, :length], v[:, :length])
    np.testing.assert_allclose(out, plain(q, k, v)[:, :length], atol=1e-6)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one segment", "three segments"])
def test_blocks_give_plain_gradients(blocks, segments):
    mask = jnp.asarray(allowed(segments))

    def in_full(q, k, v):
        scores = jnp.einsum("bthk,bshk->bhts", q, k) / jnp.sqrt(K)
        return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf)), v)

    def gradients(attend):
        return jax.jit(jax.grad(lambda qkv: jnp.sum(jnp.sin(attend(*qkv)))))(qkv())

    ours = gradients(lambda q, k, v: attention.causal(q, k, v, segment_ids_BT=segments))
    for got, expected in zip(ours, gradients(in_full)):
        np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize("block", [8, 128])
def test_a_later_key_changes_no_earlier_output(monkeypatch, block):
    monkeypatch.setattr(attention, "BLOCK", block)
    q, k, v = qkv()
    before = attention.causal(q, k, v)
    after = attention.causal(q, k.at[:, 10].add(1.0), v.at[:, 10].add(1.0))
    np.testing.assert_array_equal(after[:, :10], before[:, :10])
    assert bool(jnp.all(jnp.any(after[:, 10:] != before[:, 10:], axis=(0, 2, 3))))


def test_a_row_with_nothing_to_attend_to_is_finite():
    q, k, v = qkv()
    out = attention.masked(q, k, v, jnp.zeros((1, T, T), bool))
    assert bool(jnp.isfinite(out).all())


def test_bfloat16_stays_bfloat16_and_near(blocks):
    q, k, v = qkv(dtype=jnp.bfloat16)
    out = attention.causal(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(out), plain(*(x.astype(jnp.float32) for x in (q, k, v))), atol=0.03)


@pytest.mark.parametrize("length", [1, 128, 129, 513, 1024, 5000])
def test_a_sequence_is_at_most_four_blocks(monkeypatch, length):
    seen, masked = [], attention.masked
    monkeypatch.setattr(
        attention, "masked", lambda q, k, *args, **kw: seen.append(q.shape[1]) or masked(q, k, *args, **kw)
    )
    shape = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    assert jax.eval_shape(attention.causal, shape, shape, shape).shape == shape.shape
    assert sum(seen) == length and len(seen) <= 4 and all(size % 128 == 0 for size in seen[:-1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_are_multiplied_in_the_inputs_dtype(blocks, dtype):
    q, k, v = qkv(dtype=dtype)
    text = jax.jit(jax.grad(lambda *qkv: attention.causal(*qkv).astype(jnp.float32).sum(), (0, 1, 2))).lower(q, k, v)
    products = re.findall(r"dot_general.* : \(tensor<\S*x(\w+)>, tensor<\S*x(\w+)>\)", text.as_text())
    short = {"bfloat16": "bf16", "float32": "f32"}[dtype]
    assert len(products) > 6 and set(products) == {(short, short)}


def test_blocks_can_be_differentiated_forwards_too(blocks):
    """As curvature wants it: the gradient's own derivative along a direction, forwards, is that by two passes back."""
    qkv_, direction = qkv(), qkv(seed=1)

    def gradient(qkv):
        return jax.grad(lambda qkv: jnp.sum(jnp.sin(attention.causal(*qkv))))(qkv)

    def along(qkv):
        return sum(jnp.vdot(g, d) for g, d in zip(gradient(qkv), direction))

    for forwards, back in zip(
        jax.jit(lambda x: jax.jvp(gradient, (x,), (direction,))[1])(qkv_), jax.jit(jax.grad(along))(qkv_)
    ):
        np.testing.assert_allclose(forwards, back, atol=1e-5)


# dropout


def test_dropout_zeroes_at_its_rate_and_keeps_the_expectation():
    x = jnp.full((400, 500), 3.0)
    out = attention.drop(x, 0.3, KEY)
    rate = float(jnp.mean(out == 0))
    assert abs(rate - 0.3) < 4 * (0.3 * 0.7 / x.size) ** 0.5
    np.testing.assert_allclose(out[out != 0], 3.0 / 0.7, rtol=1e-6)
    np.testing.assert_allclose(jnp.mean(out), 3.0, rtol=0.01)


def test_what_dropout_keeps_is_rounded_once():
    x = jnp.linspace(0.5, 4, 1000, dtype=jnp.bfloat16)
    out = attention.drop(x, 0.1, KEY)
    exact = (x.astype(jnp.float32) / 0.9).astype(jnp.bfloat16)  # 0.9 itself is no bfloat16: 0.8984
    np.testing.assert_array_equal(out[out != 0], exact[out != 0])


def test_attention_dropout_keeps_the_expectation(blocks):
    q, k, v = qkv()
    keys = jax.random.split(KEY, 1000)
    draws = jax.jit(jax.vmap(lambda key: attention.causal(q, k, v, dropout=0.25, key=key)))(keys)
    mean, error = draws.mean(0), draws.std(0) / len(keys) ** 0.5
    assert float(jnp.max(jnp.abs(mean - attention.causal(q, k, v)) / error)) < 5


def test_dropout_is_of_probabilities_not_of_outputs():
    q, k, _ = qkv()
    v = jnp.ones((B, T, H, K))  # so that outputs are sums of kept probabilities
    out = jax.jit(lambda: attention.causal(q, k, v, dropout=0.5, key=KEY))()
    np.testing.assert_allclose(out, jnp.broadcast_to(out[..., :1], out.shape), rtol=1e-6)
    assert len(np.unique(np.round(out[:, -1, :, 0], 5))) == B * H


def test_one_key_is_one_mask():
    @jax.jit
    def attend(key):
        return attention.causal(*qkv(), dropout=0.5, key=key)

    np.testing.assert_array_equal(attend(KEY), attend(KEY))
    assert bool(jnp.any(attend(KEY) != attend(jax.random.key(1))))


def test_a_traced_rate_gives_what_a_constant_gives():
    traced = jax.jit(lambda rate: attention.drop(jnp.ones(1000), rate, KEY))(jnp.float32(0.2))
    np.testing.assert_allclose(traced, attention.drop(jnp.ones(1000), 0.2, KEY), rtol=1e-6)


def test_one_compilation_serves_any_rate():
    traces = []

    @jax.jit
    def drop(rate):
        traces.append(1)
        return attention.drop(jnp.ones(1000), rate, KEY)

    zeros = [float(jnp.mean(drop(jnp.float32(rate)) == 0)) for rate in (0.0, 0.1, 0.5)]
    assert len(traces) == 1
    assert zeros[0] == 0 < zeros[1] < zeros[2]


def test_dropout_without_a_key_is_an_error():
    with pytest.raises(ValueError, match="dropout needs a key"):
        attention.causal(*qkv(), dropout=0.1)


# cuDNN


def test_cudnn_does_not_serve_a_cpu():
    if jax.default_backend() != "cpu":
        pytest.skip("needs a CPU")
    assert not attention.cudnn_serves(qkv(dtype=jnp.bfloat16)[0])
    with pytest.raises(ConfigError, match="model.attention='cudnn' can't serve here .cpu, bfloat16, "):
        attention.causal(*qkv(dtype=jnp.bfloat16), implementation="cudnn")


def test_cudnn_never_ignores_dropout():
    with pytest.raises(ValueError, match="cuDNN's attention has no dropout"):
        attention.causal(*qkv(), dropout=0.1, key=KEY, implementation="cudnn")


@pytest.mark.parametrize(
    ("backend", "dtype", "heads", "serves"),
    [
        ("gpu", jnp.bfloat16, 64, True),
        ("gpu", jnp.float16, 128, True),
        ("gpu", jnp.float32, 64, False),
        ("gpu", jnp.bfloat16, 60, False),
        ("gpu", jnp.bfloat16, 136, False),
        ("cpu", jnp.bfloat16, 64, False),
    ],
)
def test_cudnn_serves_by_backend_dtype_and_head_dimension(monkeypatch, backend, dtype, heads, serves):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert attention.cudnn_serves(jax.ShapeDtypeStruct((1, 4, 1, heads), dtype)) == serves


@pytest.mark.parametrize(
    ("capability", "positions", "segments", "serves"),
    [
        ("9.0", 4, True, True),
        ("12.0", 5, False, True),
        ("9.0", 5, True, False),  # JAX makes a bias of the segments, of which cuDNN has gradients of even lengths
        ("7.5", 4, False, False),
        ("gfx942", 4, False, False),
    ],
)
def test_cudnn_serves_by_the_gpu_and_the_segments(monkeypatch, capability, positions, segments, serves):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(compute_capability=capability)])
    q_BTHK = jax.ShapeDtypeStruct((1, positions, 1, 64), jnp.bfloat16)
    assert attention.cudnn_serves(q_BTHK, segments=segments) == serves


@pytest.mark.gpu
@pytest.mark.parametrize("segments", [None, SEGMENTS[:, :12]], ids=["one segment", "three segments"])
def test_cudnn_gives_what_blocks_give(segments):
    q, k, v = (x[:, :12] for x in qkv(dtype=jnp.bfloat16))
    cudnn, blocks = (
        attention.causal(q, k, v, segment_ids_BT=segments, implementation=name) for name in ("cudnn", "blockwise")
    )
    np.testing.assert_allclose(np.float32(cudnn), np.float32(blocks), atol=0.03)


def test_cached_is_masked_of_one_query():
    q, k, v = qkv()
    mask = np.random.default_rng(0).random((B, T)) < 0.5
    mask[:, 0] = True
    expected = attention.masked(q[:, :1], k, v, jnp.asarray(mask)[:, None])[:, 0]
    found = attention.cached(q[:, 0], k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.asarray(mask))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
