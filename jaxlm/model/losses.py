"""The loss: cross-entropy by weight, in float32, with label smoothing and z-loss; and penalties on parameters.

Shape letters: B batch, T sequence, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm import tree

PyTree = Any


class TokenSums(NamedTuple):
    """Weighted sums over tokens, float32[]: to be added over micro-batches, batches and devices, divided once."""

    objective: jax.Array  # what is minimised: nll with smoothing and z-loss
    nll: jax.Array  # nats
    correct: jax.Array  # tokens whose most probable prediction is right
    weight: jax.Array


def token_sums(
    logits_BTV: Float[Array, "B T V"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    label_smoothing: Float[Array, ""] | float | None = None,
    z_loss: Float[Array, ""] | float | None = None,
) -> TokenSums:
    """Sums of weights times the per-token terms.

    Args:
      targets_BT: ids in [0, V); where the weight is 0 they may be anything in range.
      label_smoothing: the target distribution is (1 - s) one-hot + s / V uniform (Szegedy et al. 2016,
        arXiv:1512.00567). None is off.
      z_loss: adds z log(Z)^2 (PaLM, arXiv:2204.02311, section 5). None is off.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits_BTV, axis=-1)
    nll = log_z - jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    objective = nll
    if label_smoothing is not None:
        uniform = log_z - jnp.mean(logits_BTV, axis=-1)
        objective = (1 - label_smoothing) * nll + label_smoothing * uniform
    if z_loss is not None:
        objective = objective + z_loss * jnp.square(log_z)
    correct = jnp.argmax(logits_BTV, axis=-1) == targets_BT
    return TokenSums(*(jnp.sum(weights_BT * term) for term in (objective, nll, correct, jnp.ones_like(nll))))


def penalty(
    params: PyTree, *, l1: Float[Array, ""] | float | None = None, l2: Float[Array, ""] | float | None = None
) -> Float[Array, ""]:
    """l1 sum |w| + l2/2 sum w^2 over the kernels, float32[]. None is off.

    This is the penalty *in the loss*: its gradient goes through the optimizer. Decoupled decay is a transform.
    """
    kernels = jax.tree.leaves(jax.tree.map(lambda w, on: w if on else None, params, tree.mask(params, "kernels")))
    total = jnp.float32(0)
    for w in (kernel.astype(jnp.float32) for kernel in kernels):
        if l1 is not None:
            total += l1 * jnp.sum(jnp.abs(w))
        if l2 is not None:
            total += 0.5 * l2 * jnp.sum(jnp.square(w))
    return total
