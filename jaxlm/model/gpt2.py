"""GPT-2 in Flax Linen. Only pure functions leave this file: see `Model`.

Learned positions, pre-LayerNorm, tanh-GELU, biases everywhere, head tied to the embedding (Radford et al. 2019,
"Language Models are Unsupervised Multitask Learners"), with the variations that Hugging Face's GPT2Config knows;
initialised as Hugging Face does. Layer parameters are stacked on axis 0, so "h/attn/c_attn/kernel" is [L, D, 3D],
whether the loop over layers is a scan or unrolled.

Shape letters: B batch, T sequence, S cache slot, D embedding, H heads, K head dimension, F feed-forward,
V vocabulary, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int, Key

from jaxlm.errors import ConfigError
from jaxlm.model import lora
from jaxlm.model.attention import cached, causal, drop

PyTree = Any
Batch = Mapping[str, jax.Array]

VOCAB_MULTIPLE = 128

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),  # GPT-2's
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "relu": nn.relu,
    "silu": nn.silu,
}


class Placement(NamedTuple):
    """Word to the compiler of where arrays are to lie, and how queries, keys and values are computed there."""

    # (name, array) -> the array: "embedded" and "hidden" are [B, T, D], "heads" [B, T, H, K], "feed_forward" [B, T, F],
    # "table" [V, D], "kernel" the one [D, 3, H, K] of queries, keys and values
    array: Callable[[str, jax.Array], jax.Array]
    products: int = 3  # by which queries, keys and values are computed; or 1
    product: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda fn: fn  # of the function that computes them


class Shape(NamedTuple):
    """A config's `model` section as the modules below are given it: hashable, with no field open."""

    num_layers: int
    num_heads: int
    embed_dim: int
    feed_forward_dim: int
    context_length: int
    vocab_size: int
    activation: str
    norm_epsilon: float
    scale_attention: bool
    scale_attention_by_layer: bool
    tie_embeddings: bool
    dtype: Any
    param_dtype: Any
    attention: str
    remat: str
    unroll: bool
    placement: Placement


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far, in slots of fixed number. Rows are padded on the left."""

    kv: tuple[tuple[jax.Array, jax.Array], ...]  # of each layer, both [B, H, S, K]: as the products want them
    start_B: jax.Array  # int32: the first slot of each row that holds a token
    length: jax.Array  # int32[]: slots filled, the same for all rows


class Model(NamedTuple):
    """The pure functions of one architecture.

    init(key) -> params
    apply(params, batch, dropout=None, key=None) -> logits float32[B, T, V]
        batch: `inputs` int32[B, T], and for packed documents `segment_ids` and `positions` int32[B, T];
        dropout: a rate, traced or not; None is off, and then no key is needed
    hidden(params, batch, dropout=None, key=None) -> hidden states [B, T, D], in the dtype of the computation
    logits(params, hidden) -> those of hidden states, float32[B, T, V]
    head(params) -> the matrix [V padded, D] whose product with hidden states is their logits
    unstack(params) -> what `prefill` and `decode` take: layers apart, matrices in the dtype that they compute in.
        It copies layers: once, not for each token. Not for jit, which would copy the embeddings too
    prefill(unstacked, tokens_BT, start_B, slots) -> (logits of the last token, float32[B, V], a Cache)
        start_B: int32, the first of each row's tokens that counts; slots: of the cache, at least T
    decode(unstacked, token_B, cache) -> (logits of that token, float32[B, V], the cache with one more slot filled)
    context_length: tokens that it has positions for; beyond them `prefill` and `decode` give NaN
    """

    init: Callable[[jax.Array], PyTree]
    apply: Callable[..., jax.Array]
    hidden: Callable[..., jax.Array]
    logits: Callable[[PyTree, jax.Array], jax.Array]
    head: Callable[[PyTree], jax.Array]
    unstack: Callable[[PyTree], PyTree]
    prefill: Callable[[PyTree, jax.Array, jax.Array, int], tuple[jax.Array, Cache]]
    decode: Callable[[PyTree, jax.Array, Cache], tuple[jax.Array, Cache]]
    context_length: int


def _on_one_device(name: str, x: jax.Array) -> jax.Array:
    # For the sum over B in the positions' gradient XLA:GPU would lay the whole residual stream out as [T, D, B]
    return with_layout_constraint(x, Layout((0, 1, 2))) if name == "embedded" else x


ON_ONE_DEVICE = Placement(_on_one_device)

_OF_FEW_TOKENS = Placement(lambda _, x: x, products=1)
"""In decoding matrices are larger than what they are multiplied with, and none is to be cut."""


def shapes(section: Any) -> PyTree:
    """The parameters that a config's `model` section describes, in shapes; nothing is allocated.

    Raises:
      ConfigError: as `build`.
    """
    return jax.eval_shape(build(section).init, jax.random.key(0))


def build(section: Any, placement: Placement = ON_ONE_DEVICE, *, strict: bool = True) -> Model:
    """The model that a config's `model` section describes.

    Args:
      section: resolved; `vocab_size` must be set. `dropout` is not read: the rate is an argument of `apply`.
      placement: of arrays on the devices that the functions are compiled for.
      strict: that attention is cuDNN's where `attention` says so, and an error where that can't serve, in `apply` and
        `hidden`. False: there it is as "auto", which computes the same: for a model that was trained elsewhere.

    Raises:
      ConfigError: the vocabulary size is not known.
    """
    if section.vocab_size < 1:
        raise ConfigError("model.vocab_size is 0 and no tokenizer has set it; give the number of token ids")
    fields = {name: section[name] for name in Shape._fields if name != "placement"}
    shape = Shape(**fields, placement=placement)._replace(
        feed_forward_dim=section.feed_forward_dim or 4 * section.embed_dim,
        dtype=jnp.dtype(section.dtype),
        param_dtype=jnp.dtype(section.param_dtype),
    )
    anywhere = shape._replace(attention="auto") if shape.attention == "cudnn" else shape
    module = GPT2(shape if strict else anywhere)
    run: Callable[..., Any] = module.apply
    whole = functools.partial(lora.merged, section=section.lora)

    def init(key: Key[Array, ""]) -> PyTree:
        # The same numbers, of a program that does not grow with the layers.
        looped = GPT2(anywhere._replace(unroll=False))
        params = looped.init(key, jnp.zeros((1, 1), jnp.int32), method=GPT2.logits)["params"]
        return lora.added(params, section.lora, key, section.vocab_size)

    def hidden(
        params: PyTree,
        batch: Batch,
        *,
        dropout: Float[Array, ""] | float | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        packed = {f"{name}_BT": batch.get(name) for name in ("positions", "segment_ids")}
        found: jax.Array = run({"params": whole(params)}, batch["inputs"], **packed, dropout=dropout, key=key)
        return found

    def head(params: PyTree) -> Float[Array, "V D"]:
        params = whole(params)
        matrix = params["wte"]["embedding"] if shape.tie_embeddings else params["lm_head"]["kernel"].T
        return placement.array("table", matrix)

    def logits(params: PyTree, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        found: jax.Array = run({"params": whole(params)}, hidden_BTD, method=GPT2.head)
        return found

    def apply(params: PyTree, batch: Batch, **dropout: Any) -> Float[Array, "B T V"]:
        return logits(params, hidden(params, batch, **dropout))

    def unstack(params: PyTree) -> PyTree:
        params = whole(params)
        keep = functools.partial(jax.tree.map, jnp.asarray)
        cast = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, shape.dtype))

        def layer(n: int) -> PyTree:
            parts = jax.tree.map(lambda x: x[n], params["h"]).items()
            return {name: keep(part) if name.startswith("ln_") else cast(part) for name, part in parts}

        head = "wte" if shape.tie_embeddings else "lm_head"
        as_they_are = {name: keep(params[name]) for name in ("wte", "wpe", "ln_f")}
        return as_they_are | {"layers": list(map(layer, range(shape.num_layers))), "head": {head: cast(params[head])}}

    def unrolled(unstacked: PyTree, tokens_BT: Any, positions_BT: Any, per_layer: Any, shared: Mapping) -> Any:
        """(logits of the last token, keys and values of each layer)."""
        x_BTD = run({"params": unstacked}, tokens_BT, positions_BT, method=GPT2.embed)
        pairs = []
        for n, layer in enumerate(unstacked["layers"]):
            extra = {name: values[n] for name, values in (_scales(shape) | per_layer).items()}
            block = Block(anywhere._replace(placement=_OF_FEW_TOKENS))
            x_BTD, pair = block.apply({"params": layer}, x_BTD, extra, shared)
            pairs.append(pair)
        x_BD = run({"params": unstacked}, x_BTD[:, -1], method=GPT2.norm)
        return run({"params": unstacked["head"]}, x_BD, method=GPT2.head), tuple(pairs)

    def prefill(
        unstacked: PyTree, tokens_BT: Int[Array, "B T"], start_B: Int[Array, "B"], slots: int
    ) -> tuple[Float[Array, "B V"], Cache]:
        T = tokens_BT.shape[1]
        slot_BT = jnp.arange(T) - start_B[:, None]
        shared = {"segment_ids": (slot_BT >= 0).astype(jnp.int32), "keep": True}
        logits, pairs = unrolled(unstacked, tokens_BT, jnp.maximum(slot_BT, 0), {}, shared)
        fill = ((0, 0), (0, 0), (0, slots - T), (0, 0))
        return logits, Cache(jax.tree.map(lambda x: jnp.pad(x, fill), pairs), start_B, jnp.int32(T))

    def decode(unstacked: PyTree, token_B: Int[Array, "B"], cache: Cache) -> tuple[Float[Array, "B V"], Cache]:
        slot_S = jnp.arange(cache.kv[0][0].shape[2])
        shared = {"length": cache.length, "mask": (slot_S <= cache.length) & (slot_S >= cache.start_B[:, None])}
        positions_B = cache.length - cache.start_B
        logits, pairs = unrolled(unstacked, token_B[:, None], positions_B[:, None], {"kv": cache.kv}, shared)
        return logits, Cache(pairs, cache.start_B, cache.length + 1)

    return Model(init, apply, hidden, logits, head, unstack, prefill, decode, shape.context_length)


class Heads(nn.Module):
    """Queries, keys and values of all heads, each [B, T, H, K]."""

    shape: Shape

    @nn.compact
    def __call__(self, x_BTD):
        D, H, shape = x_BTD.shape[-1], self.shape.num_heads, self.shape
        kernel = self.param("kernel", nn.initializers.normal(0.02), (D, 3 * D), shape.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (3 * D,), shape.param_dtype)

        def products(x_BTD, kernel, bias):
            apart = (3, H, D // H)
            kernel_D3HK = shape.placement.array("kernel", kernel.astype(shape.dtype).reshape(D, *apart))
            x_BTD, bias_3HK = x_BTD.astype(shape.dtype), bias.astype(shape.dtype).reshape(apart)
            if shape.placement.products == 1:
                y_BT3HK = jnp.einsum("btd,dchk->btchk", x_BTD, kernel_D3HK) + bias_3HK
                return [y_BT3HK[:, :, i] for i in range(3)]
            # each writes what attention reads: nothing is taken apart, and no gradients are put together
            y_BTD = [x_BTD @ kernel_D3HK[:, i].reshape(D, D) + bias_3HK[i].ravel() for i in range(3)]
            return [y.reshape(*y.shape[:2], *apart[1:]) for y in y_BTD]

        placement = shape.placement
        return [placement.array("heads", y) for y in placement.product(products)(x_BTD, kernel, bias)]


class Attention(nn.Module):
    """Multi-head causal self-attention. `shared["keep"]` returns keys and values; `per_layer["kv"]` is a cache of them,
    which one more token extends."""

    shape: Shape

    @nn.compact
    def __call__(self, x_BTD, per_layer, shared, key):
        q, k, v = Heads(self.shape, name="c_attn")(x_BTD)
        if "scale" in per_layer:
            q = (q * per_layer["scale"]).astype(q.dtype)
        pair: Any
        if "kv" in per_layer:
            write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=shared["length"], axis=2)
            pair = tuple(write(old, new.swapaxes(1, 2)) for old, new in zip(per_layer["kv"], (k, v), strict=True))
            y = cached(q[:, 0], pair[0], pair[1], shared["mask"])
        else:
            pair = (k.swapaxes(1, 2), v.swapaxes(1, 2)) if "keep" in shared else None
            rate, segments = shared.get("dropout"), shared.get("segment_ids")
            y = causal(q, k, v, segment_ids_BT=segments, dropout=rate, key=key, implementation=self.shape.attention)
        return _residual(self.shape, "c_proj")(y.reshape(x_BTD.shape)), pair


class FeedForward(nn.Module):
    shape: Shape

    @nn.compact
    def __call__(self, x_BTD):
        # of what an activation computes, only its argument is kept for the backward pass
        activation = jax.checkpoint(ACTIVATIONS[self.shape.activation])
        y_BTF = activation(_dense(self.shape, self.shape.feed_forward_dim, "c_fc")(x_BTD))
        return _residual(self.shape, "c_proj")(self.shape.placement.array("feed_forward", y_BTF))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)). `per_layer` is what the scan over layers slices."""

    shape: Shape

    @nn.compact
    def __call__(self, x_BTD, per_layer, shared):
        rate = shared.get("dropout")
        keys = [None] * 3 if rate is None else jax.random.split(per_layer["key"], 3)
        normed = _norm(self.shape, "ln_1")(x_BTD)
        y, pair = Attention(self.shape, name="attn")(normed, per_layer, shared, keys[0])
        x_BTD = x_BTD + _drop(y, rate, keys[1])
        y = FeedForward(self.shape, name="mlp")(_norm(self.shape, "ln_2")(x_BTD))
        return self.shape.placement.array("hidden", x_BTD + _drop(y, rate, keys[2])), pair


class GPT2(nn.Module):
    shape: Shape

    def setup(self):
        shape = self.shape
        padded = -(-shape.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        embed = dict(features=shape.embed_dim, param_dtype=shape.param_dtype)
        self.wte = nn.Embed(padded, embedding_init=_vocabulary(shape, axis=0), **embed)
        self.wpe = nn.Embed(shape.context_length, embedding_init=nn.initializers.normal(0.02), **embed)
        block = Block
        if shape.remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if shape.remat == "dots" else None
            block = nn.remat(Block, policy=policy, prevent_cse=shape.unroll)  # looped, nothing undoes it
        self.h = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=shape.num_layers,
            unroll=shape.num_layers if shape.unroll else 1,
        )(shape)
        self.ln_f = _norm(shape, None)
        if not shape.tie_embeddings:
            self.lm_head = nn.Dense(
                padded,
                use_bias=False,
                dtype=shape.dtype,
                param_dtype=shape.param_dtype,
                kernel_init=_vocabulary(shape, axis=1),
                dot_general=functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32),
            )

    def logits(self, tokens_BT):
        return self.head(self(tokens_BT))

    def __call__(self, tokens_BT, *, positions_BT=None, segment_ids_BT=None, dropout=None, key=None):
        """Hidden states [B, T, D] after the last norm."""
        T = tokens_BT.shape[1]
        if T > self.shape.context_length:
            raise ValueError(f"{T} tokens are longer than the context of {self.shape.context_length}")
        x_BTD = self.shape.placement.array("embedded", self.embed(tokens_BT, positions_BT))
        shared = {} if segment_ids_BT is None else {"segment_ids": segment_ids_BT}
        per_layer = _scales(self.shape)
        if dropout is not None:
            if key is None:
                raise ValueError("dropout needs a key")
            embedding_key, layers_key = jax.random.split(key)
            x_BTD = _drop(x_BTD, dropout, embedding_key)
            shared["dropout"] = dropout
            per_layer["key"] = jax.random.split(layers_key, self.shape.num_layers)
        x_BTD, _ = self.h(x_BTD, per_layer, shared)
        return self.norm(x_BTD)

    def embed(self, tokens_BT, positions_BT):
        # positions are a slice, not a gather, where they can be: its gradient is no scatter
        given = positions_BT is not None
        length, places = self.shape.context_length, self.wpe.embedding
        positions = _rows(places, positions_BT, length) if given else places[: tokens_BT.shape[1]]
        table = self.shape.placement.array("table", self.wte.embedding)
        return (_rows(table, tokens_BT, self.shape.vocab_size) + positions).astype(self.shape.dtype)

    def norm(self, x):
        return self.ln_f(x)

    def head(self, hidden):
        """Logits float32[..., V]; the rows that pad the vocabulary don't leave."""
        if self.shape.tie_embeddings:
            embedding = self.wte.embedding.astype(self.shape.dtype)
            logits = jnp.einsum("...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32)
        else:
            logits = self.lm_head(hidden)
        return logits[..., : self.shape.vocab_size]


def _scales(shape):
    """What queries are multiplied with in each layer, beside 1 / sqrt(K), where that is not 1."""
    if shape.scale_attention and not shape.scale_attention_by_layer:
        return {}
    scale = 1.0 if shape.scale_attention else (shape.embed_dim // shape.num_heads) ** 0.5
    number_L = jnp.arange(1, shape.num_layers + 1) if shape.scale_attention_by_layer else jnp.ones(shape.num_layers)
    return {"scale": scale / number_L}


def _rows(table, ids, size):
    """Rows in the parameters' dtype, so that their gradient is a float32 scatter; NaN for an id outside [0, size)."""
    ids = jnp.where((ids >= 0) & (ids < size), ids, len(table))  # take wraps negative ids, and some rows pad
    return jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan)


def _vocabulary(shape, axis):
    """N(0, 0.02), and zero for the ids that pad the vocabulary: no norm counts them, and no export loses them."""

    def init(key, full, dtype):
        known = jax.lax.broadcasted_iota(jnp.int32, full, axis) < shape.vocab_size
        return jnp.where(known, nn.initializers.normal(0.02)(key, full, dtype), 0)

    return init


def _dense(shape, features, name, stddev=0.02):
    init = nn.initializers.normal(stddev)
    return nn.Dense(features, dtype=shape.dtype, param_dtype=shape.param_dtype, kernel_init=init, name=name)


def _residual(shape, name):
    """The projection back to the residual stream, whose variance grows with the layers."""
    return _dense(shape, shape.embed_dim, name, stddev=0.02 / (2 * shape.num_layers) ** 0.5)


def _norm(shape, name):
    return nn.LayerNorm(shape.norm_epsilon, dtype=shape.dtype, param_dtype=shape.param_dtype, name=name)


def _drop(x, rate, key):
    return x if rate is None else drop(x, rate, key)
