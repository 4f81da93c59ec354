"""Causal attention, by cuDNN where it serves and else in blocks that skip what lies above the diagonal.

Shape letters: B batch, T query position, S key position, H heads, K head dimension.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxlm.errors import ConfigError

BLOCK, BLOCKS = 128, 4
"""Queries a block are a multiple of BLOCK, so many that there are at most BLOCKS: each is more to compile. On the CPU
64 to 128 are fastest at T = 256; at T = 1024 128 and 256 are alike, at T = 2048 128 to 512."""

_QUERIES_BY_KEYS = "bthk,bshk->bhts"

WANTS = (
    "wants a GPU of NVIDIA's since Ampere, bfloat16 or float16, a head dimension that is a multiple of 8 and at most "
    "128, and of packed rows an even number of positions"
)
"""What cuDNN's attention takes, for people."""

MASKED = -1e30
"""A masked score: finite, so that a row with nothing to attend to gives no NaN."""


def causal(
    q_BTHK: Float[Array, "B T H K"],
    k_BTHK: Float[Array, "B T H K"],
    v_BTHK: Float[Array, "B T H K"],
    *,
    segment_ids_BT: Int[Array, "B T"] | None = None,
    dropout: Float[Array, ""] | float | None = None,
    key: Key[Array, ""] | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T H K"]:
    """softmax(q k^T / sqrt(K)) v over the keys at or before each query, and of its segment.

    Scores and softmax are float32, the products are of the inputs' dtype.

    Args:
      segment_ids_BT: positions attend only within equal ids; None is one segment.
      dropout: rate in [0, 1) on the attention probabilities; None is off. Needs `key`.
      implementation: "cudnn" (raises where it can't serve), "blockwise", or "auto".
    """
    serves = cudnn_serves(q_BTHK, segments=segment_ids_BT is not None)
    if implementation == "auto":
        implementation = "cudnn" if dropout is None and serves else "blockwise"
    if implementation == "cudnn":
        if dropout is not None:
            raise ValueError("cuDNN's attention has no dropout; ask for 'blockwise' or 'auto'")
        if not serves:
            given = f"{jax.default_backend()}, {q_BTHK.dtype}, {q_BTHK.shape[-1]}, {q_BTHK.shape[1]} positions"
            raise ConfigError(
                f"model.attention='cudnn' can't serve here ({given}): it {WANTS}; set model.attention='auto'"
            )
        same = None if segment_ids_BT is None else _same_segment(segment_ids_BT, segment_ids_BT)[:, None]
        return jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, mask=same, is_causal=True, implementation="cudnn")
    T = q_BTHK.shape[1]
    size = BLOCK * -(-T // (BLOCK * BLOCKS))
    blocks = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        mask = (jnp.arange(start, stop)[:, None] >= jnp.arange(stop))[None]
        if segment_ids_BT is not None:
            mask = mask & _same_segment(segment_ids_BT[:, start:stop], segment_ids_BT[:, :stop])
        block_key = None if key is None else jax.random.fold_in(key, start)
        blocks.append(
            masked(q_BTHK[:, start:stop], k_BTHK[:, :stop], v_BTHK[:, :stop], mask, dropout=dropout, key=block_key)
        )
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def masked(
    q_BTHK: Float[Array, "B T H K"],
    k_BSHK: Float[Array, "B S H K"],
    v_BSHK: Float[Array, "B S H K"],
    mask_BTS: Bool[Array, "#B T S"],
    *,
    dropout: Float[Array, ""] | float | None = None,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "B T H K"]:
    """Attention where `mask_BTS` is True, with the scores in full: for one block."""
    scale = q_BTHK.shape[-1] ** -0.5
    scores_BHTS = _scores(q_BTHK * scale, k_BSHK)
    scores_BHTS = jnp.where(mask_BTS[:, None], scores_BHTS, MASKED)
    weights_BHTS = jax.nn.softmax(scores_BHTS, axis=-1)
    if dropout is not None:
        weights_BHTS = drop(weights_BHTS, dropout, key)
    return jnp.einsum("bhts,bshk->bthk", weights_BHTS.astype(v_BSHK.dtype), v_BSHK)


@jax.custom_jvp
def _scores(q_BTHK: Float[Array, "B T H K"], k_BSHK: Float[Array, "B S H K"]) -> Float[Array, "B H T S"]:
    """q k^T in float32. Its gradient is multiplied in the inputs' dtype: autodiff would multiply in float32, of which a
    GPU makes TF32, for inputs of bfloat16 too."""
    return jnp.einsum(_QUERIES_BY_KEYS, q_BTHK, k_BSHK, preferred_element_type=jnp.float32)


@_scores.defjvp
def _scores_jvp(inputs, tangents):
    (q_BTHK, k_BSHK), (d_q, d_k) = inputs, tangents
    change = jnp.einsum(_QUERIES_BY_KEYS, d_q, k_BSHK) + jnp.einsum(_QUERIES_BY_KEYS, q_BTHK, d_k)
    return _scores(q_BTHK, k_BSHK), change.astype(jnp.float32)


def cached(
    q_BHK: Float[Array, "B H K"],
    k_BHSK: Float[Array, "B H S K"],
    v_BHSK: Float[Array, "B H S K"],
    mask_BS: Bool[Array, "B S"],
) -> Float[Array, "B H K"]:
    """`masked` of one query a row. Heads before slots: the other way round each product would copy the whole cache."""
    scale = q_BHK.shape[-1] ** -0.5
    scores_BHS = jnp.einsum("bhk,bhsk->bhs", q_BHK * scale, k_BHSK, preferred_element_type=jnp.float32)
    weights_BHS = jax.nn.softmax(jnp.where(mask_BS[:, None], scores_BHS, MASKED), axis=-1)
    return jnp.einsum("bhs,bhsk->bhk", weights_BHS.astype(v_BHSK.dtype), v_BHSK)


def drop(x: Float[Array, "..."], rate: Float[Array, ""] | float, key: Key[Array, ""] | None) -> Float[Array, "..."]:
    """Inverted dropout with a traced rate: zero with probability `rate`, else scaled by 1 / (1 - rate)."""
    if key is None:
        raise ValueError("dropout needs a key")
    keep = 1.0 - jnp.asarray(rate, jnp.float32)
    kept = jax.random.bernoulli(key, keep, x.shape)
    return jnp.where(kept, (x / keep).astype(x.dtype), jnp.zeros((), x.dtype))


def cudnn_serves(q_BTHK: Float[Array, "B T H K"] | jax.ShapeDtypeStruct, segments: bool = False) -> bool:
    """Whether cuDNN's fused attention takes such queries here, in training too.

    Args:
      segments: whether the queries attend within segments.
    """
    if jax.default_backend() != "gpu":
        return False
    # "9.0"; of AMD's GPUs "gfx942"; what does not tell is taken for one that serves
    capability = str(getattr(jax.local_devices()[0], "compute_capability", "8.0"))
    ampere = capability.replace(".", "").isdigit() and float(capability) >= 8
    return ampere and _cudnn_takes(q_BTHK, segments)


def _cudnn_takes(q_BTHK: Float[Array, "B T H K"] | jax.ShapeDtypeStruct, segments: bool = False) -> bool:
    """Whether it takes such queries, on a device that has it."""
    _, T, _, K = q_BTHK.shape
    half = q_BTHK.dtype in (jnp.bfloat16, jnp.float16)
    return half and K % 8 == 0 and K <= 128 and not (segments and T % 2)


def falls_back(section: Any, here: bool = True) -> str:
    """Why a model's attention is in blocks and not cuDNN's, in words; "" where it is cuDNN's.

    Args:
      section: a config's `model` section, resolved.
      here: on this machine's devices; False: on a GPU that has cuDNN's.
    """
    if section.attention == "blockwise":
        return "model.attention='blockwise'"
    if section.dropout:
        return "cuDNN's has no dropout"
    K = section.embed_dim // section.num_heads
    queries = jax.ShapeDtypeStruct((1, section.context_length, section.num_heads, K), section.dtype)
    if not (cudnn_serves if here else _cudnn_takes)(queries):
        return f"cuDNN's {WANTS}"
    return ""


def _same_segment(a_BT: Int[Array, "B T"], b_BS: Int[Array, "B S"]) -> Bool[Array, "B T S"]:
    return a_BT[:, :, None] == b_BS[:, None, :]
