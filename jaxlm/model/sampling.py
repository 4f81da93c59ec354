"""A token from logits: repetition penalty, temperature, top k, top p.

Shape letters: B batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Sampling(NamedTuple):
    """How a token is drawn from logits: repetition penalty, temperature, top k, top p, in this order. All are traced.

    temperature 0 takes the most probable token; a top_k of 0, top_p of 1 and repetition_penalty of 1 are off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    @property
    def kind(self) -> str:
        """ "greedy", "softmax", or "filtered" by top k or top p: programs of their own, for what one of them does not
        need would cost it time."""
        if self.temperature < float(np.finfo(np.float32).tiny):
            return "greedy"
        return "filtered" if self.top_k or self.top_p < 1 else "softmax"


class Draws(NamedTuple):
    """What draws depend on, beside logits."""

    seeds_B: np.ndarray  # uint32
    sampling: Sampling
    end_of_text: int


def penalize(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"], penalty: Float[Array, ""] | float
) -> Float[Array, "B V"]:
    """Logits of the ids seen so far, over the penalty where they are positive and times it where they are negative
    (Keskar et al. 2019, CTRL, arXiv:1909.05858; for negative ones as transformers does)."""
    return jnp.where(seen_BV, jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)


def filter_logits(logits_BV: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """All but the top k, and what lies outside the smallest set whose probability reaches top p (Holtzman et al. 2020,
    arXiv:1904.09751), at minus infinity; top k goes first. Of equal ones at a border all stay."""
    k = jnp.where(sampling.top_k > 0, sampling.top_k, logits_BV.shape[-1])
    keep = _fewest(logits_BV, lambda chosen: chosen.sum(-1, keepdims=True) >= k)
    logits_BV = jnp.where(keep, logits_BV, -jnp.inf)
    probability = jax.nn.softmax(logits_BV, axis=-1)
    p = jnp.where(sampling.top_p < 1, sampling.top_p, jnp.inf)  # off: never reached, whatever a sum is rounded to
    keep = _fewest(probability, lambda chosen: jnp.where(chosen, probability, 0).sum(-1, keepdims=True) >= p)
    return jnp.where(keep, logits_BV, -jnp.inf)


def _fewest(x_BV: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Which are the largest, the fewest of them that are `enough`; all, if all are not. The border is found bit by bit:
    on the CPU sorting takes twenty times as long."""
    bits = jax.lax.bitcast_convert_type(x_BV, jnp.uint32)
    high = jnp.uint32(1 << 31)
    ordered_BV = jnp.where(bits < high, bits | high, ~bits)  # floats and these are in the same order

    def settle(n: jax.Array, border_B1: jax.Array) -> jax.Array:
        higher = border_B1 | (high >> n.astype(jnp.uint32))
        return jnp.where(enough(ordered_BV >= higher), higher, border_B1)

    return ordered_BV >= jax.lax.fori_loop(0, 32, settle, jnp.zeros_like(ordered_BV[:, :1]))


def draw(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"], drawn_B: Int[Array, "B"], draws: Draws, kind: str
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """A token for each row, and its log-probability under the softmax of `logits_BV` as they are.

    Args:
      logits_BV: of V ids and maybe more, which are not drawn.
      drawn_B: n; token n of a row is drawn with fold_in(key(seed), n).
    """
    scores_BV = penalize(logits_BV[:, : seen_BV.shape[1]], seen_BV, draws.sampling.repetition_penalty)
    if kind == "greedy":
        token_B = jnp.argmax(scores_BV, axis=-1)
    else:
        scores_BV = (scores_BV - scores_BV.max(-1, keepdims=True)) / draws.sampling.temperature  # none overflows
        if kind == "filtered":
            scores_BV = filter_logits(scores_BV, draws.sampling)
        keys_B = jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(draws.seeds_B, drawn_B)
        token_B = jax.vmap(jax.random.categorical)(keys_B, scores_BV)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B.astype(jnp.int32), chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
