"""GPT-2 in Flax Linen. Only pure functions leave this file: see `Model`.

Learned positions, pre-LayerNorm, tanh-GELU, biases everywhere, head tied to the embedding (Radford et al. 2019,
"Language Models are Unsupervised Multitask Learners"); initialised as Hugging Face does. Layer parameters are
stacked on axis 0, so "h/attn/c_attn/kernel" is [L, D, 3D], whether the loop over layers is a scan or unrolled.

Shape letters: B batch, T sequence, S cache slot, D embedding, H heads, K head dimension, F feed-forward (4D),
V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from jaxlm.errors import ConfigError
from jaxlm.model.attention import causal, drop, masked

PyTree = Any
Batch = Mapping[str, jax.Array]

VOCAB_MULTIPLE = 128
LAYER_NORM_EPSILON = 1e-5


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far, in slots of fixed number. Rows are padded on the left."""

    k_LBSHK: jax.Array
    v_LBSHK: jax.Array
    start_B: jax.Array  # int32: the first slot of each row that holds a token
    length: jax.Array  # int32[]: slots filled, the same for all rows


class Model(NamedTuple):
    """The pure functions of one architecture.

    init(key) -> params
    apply(params, batch, dropout=None, key=None) -> logits float32[B, T, V]
        batch: `inputs` int32[B, T], and for packed documents `segment_ids` and `positions` int32[B, T];
        dropout: a rate, traced or not; None is off, and then no key is needed
    cache(start_B, slots) -> an empty Cache
    decode(params, tokens_BT, cache) -> (logits of the last token, float32[B, V], cache with T more slots filled)
    """

    init: Callable[[jax.Array], PyTree]
    apply: Callable[..., jax.Array]
    cache: Callable[[jax.Array, int], Cache]
    decode: Callable[[PyTree, jax.Array, Cache], tuple[jax.Array, Cache]]


def build(section: Any) -> Model:
    """The model that a config's `model` section describes.

    Args:
      section: resolved; `vocab_size` must be set. `dropout` is not read: the rate is an argument of `apply`.

    Raises:
      ConfigError: the vocabulary size is not known.
    """
    if section.vocab_size < 1:
        raise ConfigError("model.vocab_size is 0 and no tokenizer has set it; give the number of token ids")
    module = GPT2(
        num_layers=section.num_layers,
        num_heads=section.num_heads,
        embed_dim=section.embed_dim,
        context_length=section.context_length,
        vocab_size=section.vocab_size,
        dtype=jnp.dtype(section.dtype),
        param_dtype=jnp.dtype(section.param_dtype),
        attention=section.attention,
        remat=section.remat,
        unroll=section.unroll,
    )

    run: Callable[..., Any] = module.apply

    def init(key: Key[Array, ""]) -> PyTree:
        return module.init(key, jnp.zeros((1, 1), jnp.int32))["params"]  # the head has no parameters of its own

    def apply(
        params: PyTree,
        batch: Batch,
        *,
        dropout: Float[Array, ""] | float | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T V"]:
        hidden = run(
            {"params": params},
            batch["inputs"],
            positions_BT=batch.get("positions"),
            segment_ids_BT=batch.get("segment_ids"),
            dropout=dropout,
            key=key,
        )
        return run({"params": params}, hidden, method=GPT2.head)

    def cache(start_B: Int[Array, "B"], slots: int) -> Cache:
        shape = (module.num_layers, len(start_B), slots, module.num_heads, module.embed_dim // module.num_heads)
        empty = jnp.zeros(shape, module.dtype)
        return Cache(empty, empty, jnp.asarray(start_B, jnp.int32), jnp.int32(0))

    def decode(params: PyTree, tokens_BT: Int[Array, "B T"], cache: Cache) -> tuple[Float[Array, "B V"], Cache]:
        hidden, cache = run({"params": params}, tokens_BT, cache, method=GPT2.extend)
        return run({"params": params}, hidden[:, -1], method=GPT2.head), cache

    return Model(init, apply, cache, decode)


class Attention(nn.Module):
    """Multi-head causal self-attention; with `slots`, over a cache that it extends."""

    num_heads: int
    num_layers: int
    dtype: Any
    param_dtype: Any
    attention: str

    @nn.compact
    def __call__(self, x_BTD, per_layer, shared, key):
        heads = (self.num_heads, x_BTD.shape[-1] // self.num_heads)
        qkv = _dense(self, 3 * x_BTD.shape[-1], "c_attn")(x_BTD)
        q, k, v = (part.reshape(*part.shape[:-1], *heads) for part in jnp.split(qkv, 3, axis=-1))
        slots = None
        if "slots" in per_layer:
            slots = tuple(
                jax.lax.dynamic_update_slice_in_dim(old, new, shared["length"], axis=1)
                for old, new in zip(per_layer["slots"], (k, v), strict=True)
            )
            y = masked(q, slots[0], slots[1], shared["mask"])
        else:
            rate, segments = shared.get("dropout"), shared.get("segment_ids")
            y = causal(q, k, v, segment_ids_BT=segments, dropout=rate, key=key, implementation=self.attention)
        return _dense(self, x_BTD.shape[-1], "c_proj", _residual_stddev(self))(y.reshape(x_BTD.shape)), slots


class FeedForward(nn.Module):
    num_layers: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x_BTD):
        y_BTF = nn.gelu(_dense(self, 4 * x_BTD.shape[-1], "c_fc")(x_BTD), approximate=True)
        return _dense(self, x_BTD.shape[-1], "c_proj", _residual_stddev(self))(y_BTF)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)). `per_layer` is what the scan over layers slices."""

    num_heads: int
    num_layers: int
    dtype: Any
    param_dtype: Any
    attention: str

    @nn.compact
    def __call__(self, x_BTD, per_layer, shared):
        rate = shared.get("dropout")
        keys = [None] * 3 if rate is None else jax.random.split(per_layer["key"], 3)
        facts = dict(num_layers=self.num_layers, dtype=self.dtype, param_dtype=self.param_dtype)
        attend = Attention(num_heads=self.num_heads, attention=self.attention, name="attn", **facts)
        y, slots = attend(_norm(self, "ln_1")(x_BTD), per_layer, shared, keys[0])
        x_BTD = x_BTD + _drop(y, rate, keys[1])
        y = FeedForward(name="mlp", **facts)(_norm(self, "ln_2")(x_BTD))
        return x_BTD + _drop(y, rate, keys[2]), slots


class GPT2(nn.Module):
    num_layers: int
    num_heads: int
    embed_dim: int
    context_length: int
    vocab_size: int
    dtype: Any
    param_dtype: Any
    attention: str
    remat: str
    unroll: bool

    def setup(self):
        padded = -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        embed = dict(features=self.embed_dim, param_dtype=self.param_dtype, embedding_init=nn.initializers.normal(0.02))
        self.wte = nn.Embed(padded, **embed)
        self.wpe = nn.Embed(self.context_length, **embed)
        block = Block
        if self.remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.remat == "dots" else None
            block = nn.remat(Block, policy=policy, prevent_cse=False)
        self.h = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=self.num_layers,
            unroll=self.num_layers if self.unroll else 1,
        )(self.num_heads, self.num_layers, self.dtype, self.param_dtype, self.attention)
        self.ln_f = nn.LayerNorm(LAYER_NORM_EPSILON, dtype=self.dtype, param_dtype=self.param_dtype)

    def __call__(self, tokens_BT, *, positions_BT=None, segment_ids_BT=None, dropout=None, key=None):
        """Hidden states [B, T, D] after the last norm."""
        T = tokens_BT.shape[1]
        if T > self.context_length:
            raise ValueError(f"{T} tokens are longer than the context of {self.context_length}")
        # positions are a slice, not a gather, where they can be: its gradient is no scatter
        given = positions_BT is not None
        positions = _rows(self.wpe, positions_BT, self.context_length) if given else self.wpe.embedding[:T]
        x_BTD = (_rows(self.wte, tokens_BT, self.vocab_size) + positions).astype(self.dtype)
        shared = {} if segment_ids_BT is None else {"segment_ids": segment_ids_BT}
        per_layer = {}
        if dropout is not None:
            if key is None:
                raise ValueError("dropout needs a key")
            embedding_key, layers_key = jax.random.split(key)
            x_BTD = _drop(x_BTD, dropout, embedding_key)
            shared["dropout"] = dropout
            per_layer["key"] = jax.random.split(layers_key, self.num_layers)
        x_BTD, _ = self.h(x_BTD, per_layer, shared)
        return self.ln_f(x_BTD)

    def extend(self, tokens_BT, cache):
        """Hidden states [B, T, D] of T more tokens, which fill the cache's next T slots."""
        slot_T = cache.length + jnp.arange(tokens_BT.shape[1])
        positions_BT = jnp.maximum(slot_T - cache.start_B[:, None], 0)
        slot_S = jnp.arange(cache.k_LBSHK.shape[2])
        mask_BTS = (slot_S <= slot_T[:, None]) & (slot_S >= cache.start_B[:, None, None])
        positions = _rows(self.wpe, positions_BT, self.context_length)
        x_BTD = (_rows(self.wte, tokens_BT, self.vocab_size) + positions).astype(self.dtype)
        shared = {"length": cache.length, "mask": mask_BTS}
        x_BTD, (k, v) = self.h(x_BTD, {"slots": (cache.k_LBSHK, cache.v_LBSHK)}, shared)
        return self.ln_f(x_BTD), Cache(k, v, cache.start_B, cache.length + tokens_BT.shape[1])

    def head(self, hidden):
        """Logits float32[..., V]; the rows that pad the vocabulary don't leave."""
        embedding = self.wte.embedding.astype(self.dtype)
        logits = jnp.einsum("...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32)
        return logits[..., : self.vocab_size]


def _rows(embed, ids, size):
    """Rows in the parameters' dtype, so that their gradient is a float32 scatter; NaN for an id outside [0, size)."""
    ids = jnp.where((ids >= 0) & (ids < size), ids, len(embed.embedding))  # take wraps negative ids, and some rows pad
    return jnp.take(embed.embedding, ids, axis=0, mode="fill", fill_value=jnp.nan)


def _dense(module, features, name, stddev=0.02):
    return nn.Dense(
        features,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        kernel_init=nn.initializers.normal(stddev),
        name=name,
    )


def _residual_stddev(module):
    return 0.02 / (2 * module.num_layers) ** 0.5


def _norm(module, name):
    return nn.LayerNorm(LAYER_NORM_EPSILON, dtype=module.dtype, param_dtype=module.param_dtype, name=name)


def _drop(x, rate, key):
    return x if rate is None else drop(x, rate, key)
