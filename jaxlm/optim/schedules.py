"""Schedules as shapes: a multiplier in [0, 1] over the steps of a run, times a peak that may be traced.

Every shape has the signature `shape(steps, *, warmup, final) -> (count -> multiplier)`, so that swapping one for
another is one word. `steps` is the length of the run. `warmup` below 1 is a fraction of it, from 1 on a number of
steps, during which the multiplier rises linearly from 0. `final` is where the multiplier ends, as a fraction of
the peak. `warmup` and `final` may be traced.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Number = Float[Array, ""] | float
Shape = Callable[[Int[Array, ""] | int], Float[Array, ""]]


def constant(steps: int, *, warmup: Number = 0.0, final: Number = 1.0) -> Shape:
    """1 after the warmup; `final` is not used."""
    del final
    return _after_warmup(steps, warmup, jnp.ones_like)


def warmup_cosine(steps: int, *, warmup: Number = 0.0, final: Number = 0.0) -> Shape:
    """Half a cosine from 1 to `final` (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts)."""
    return _after_warmup(steps, warmup, lambda x: final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * x)))


def warmup_linear(steps: int, *, warmup: Number = 0.0, final: Number = 0.0) -> Shape:
    """A line from 1 to `final`."""
    return _after_warmup(steps, warmup, lambda x: 1 - (1 - final) * x)


def _after_warmup(steps: int, warmup: Number, decay: Callable[[jax.Array], jax.Array]) -> Shape:
    """Linear warmup, then `decay` of the progress in [0, 1] over what is left of the run."""

    def shape(count: Int[Array, ""] | int) -> Float[Array, ""]:
        count = jnp.asarray(count, jnp.float32)
        given = jnp.asarray(warmup, jnp.float32)  # an int times the steps may pass 2**31
        length = jnp.where(given < 1, given * steps, given)
        progress = jnp.clip((count - length) / jnp.maximum(steps - length, 1), 0, 1)
        return jnp.where(count < length, count / jnp.maximum(length, 1), decay(progress))

    return shape
