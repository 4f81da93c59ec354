"""The loss: cross-entropy by weight, in float32, with label smoothing and z-loss; and penalties on parameters.

Shape letters: B batch, T sequence, D embedding, V vocabulary (of a head it may be padded).
"""

from __future__ import annotations

import functools
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
    uniform = None if label_smoothing is None else log_z - jnp.mean(logits_BTV, axis=-1)
    correct = jnp.argmax(logits_BTV, axis=-1) == targets_BT
    return _sums(weights_BT, _objective(nll, uniform, log_z, label_smoothing, z_loss), nll, correct)


def head_sums(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    vocab_size: int,
    label_smoothing: Float[Array, ""] | float | None = None,
    z_loss: Float[Array, ""] | float | None = None,
    chunks: int = 1,
) -> TokenSums:
    """`token_sums` of the logits hidden @ head^T, which are never there in float32 unless the hidden states are.

    Logits are of the hidden states' dtype, statistics float32. The gradient of the objective is computed together with
    it, so nothing of the logits' size is kept for a backward pass. Only the objective has a gradient; that of the other
    sums is taken to be zero. Forward-mode differentiation is not defined.

    Args:
      head_VD: of any float dtype; its gradient is summed in float32 and then of that dtype. Rows from `vocab_size` on
        are padding.
      chunks: parts of T, one after another, whose logits are in memory at a time.

    Raises:
      ValueError: T does not divide into the chunks.
    """
    return _head_sums(vocab_size, chunks, hidden_BTD, head_VD, targets_BT, weights_BT, label_smoothing, z_loss)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _head_sums(vocab_size, chunks, hidden, head, targets, weights, smoothing, z_loss):
    return _forward(vocab_size, chunks, hidden, head, targets, weights, smoothing, z_loss)[0]


def _forward(vocab_size, chunks, hidden, head, targets, weights, smoothing, z_loss):
    """(the sums, the head's dtype and the gradients of the objective with respect to all but the targets)."""
    one = functools.partial(_chunk, vocab_size, head, smoothing, z_loss)
    like_head = jnp.zeros(0, head.dtype)  # what goes from the one pass to the other must be arrays
    if chunks == 1:
        sums, gradients = one((hidden, targets, weights))
        return sums, (like_head, *gradients)

    def joined(x):
        x = x.swapaxes(0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    def add(total, part):
        sums, (d_hidden, d_weights, *shared) = one(part)
        return jax.tree.map(jnp.add, total, (sums, shared)), (d_hidden, d_weights)

    parts = chunked((hidden, targets, weights), chunks)
    sums, (_, _, *shared) = jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (sums, shared))
    (sums, shared), rows = jax.lax.scan(add, zeros, parts)
    return sums, (like_head, *map(joined, rows), *shared)


def _chunk(vocab_size, head, smoothing, z_loss, part):
    hidden_BTD, targets_BT, weights_BT = part
    head_VD = head.astype(hidden_BTD.dtype)
    id_V = jnp.arange(len(head))
    here_BTV = id_V == targets_BT[..., None]
    logits_BTV = jnp.einsum("btd,vd->btv", hidden_BTD, head_VD)
    if len(head) > vocab_size:
        logits_BTV = jnp.where(id_V < vocab_size, logits_BTV, -jnp.inf)
    x_BTV = logits_BTV.astype(jnp.float32)
    target = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0].astype(jnp.float32)
    top = jnp.max(x_BTV, axis=-1)
    # argmax == target, as another maximum of the same pass: a GPU writes the gradient slowly where it also reduces
    before = jnp.max(jnp.where(id_V < targets_BT[..., None], x_BTV, -jnp.inf), axis=-1)
    top, before = jax.lax.optimization_barrier((top, before))
    correct = (target == top) & (target > before)
    log_z = top + jnp.log(jnp.sum(jnp.exp(x_BTV - top[..., None]), axis=-1))
    nll = log_z - target

    uniform, share = None, jnp.float32(0)
    if smoothing is not None:
        uniform = log_z - jnp.sum(jnp.where(id_V < vocab_size, x_BTV, 0.0), axis=-1) / vocab_size
        share = jnp.where(id_V < vocab_size, smoothing / vocab_size, 0.0)
    objective = _objective(nll, uniform, log_z, smoothing, z_loss)

    of_log_z = jnp.float32(1) if z_loss is None else 1 + 2 * z_loss * log_z[..., None]
    of_target = jnp.where(here_BTV, 1.0 if smoothing is None else 1 - smoothing, 0.0)
    gradient_BTV = jnp.exp(x_BTV - log_z[..., None]) * of_log_z - of_target - share
    gradient_BTV = (gradient_BTV * weights_BT[..., None]).astype(logits_BTV.dtype)
    gradient_BTV = jax.lax.optimization_barrier(gradient_BTV)  # written once: each product would compute it for itself
    d_hidden = jnp.einsum("btv,vd->btd", gradient_BTV, head_VD)
    # [D, V] is the side from which XLA's CPU takes the gradient as it lies; the other copies it
    flat_DN, flat_NV = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]).T, gradient_BTV.reshape(-1, len(head))
    d_head = jnp.dot(flat_DN, flat_NV, preferred_element_type=jnp.float32).T
    d_smoothing = None if uniform is None else jnp.sum(weights_BT * (uniform - nll))
    d_z_loss = None if z_loss is None else jnp.sum(weights_BT * jnp.square(log_z))
    return _sums(weights_BT, objective, nll, correct), (d_hidden, objective, d_head, d_smoothing, d_z_loss)


def _backward(vocab_size, chunks, gradients, cotangents):
    scale = cotangents.objective
    like_head, *gradients = gradients
    d_hidden, d_weights, d_head, *d_strengths = jax.tree.map(lambda x: (x * scale).astype(x.dtype), gradients)
    return d_hidden, d_head.astype(like_head.dtype), None, d_weights, *d_strengths


_head_sums.defvjp(_forward, _backward)


def chunked(arrays: PyTree, chunks: int) -> PyTree:
    """Arrays [B, T, ...] as [chunks, B, T / chunks, ...].

    Raises:
      ValueError: T does not divide into the chunks.
    """

    def cut(x: jax.Array) -> jax.Array:
        if x.shape[1] % chunks:
            raise ValueError(f"{x.shape[1]} positions do not divide into {chunks} chunks of the loss")
        return x.reshape(x.shape[0], chunks, -1, *x.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(cut, arrays)


def _objective(nll, uniform, log_z, smoothing, z_loss):
    objective = nll if smoothing is None else (1 - smoothing) * nll + smoothing * uniform
    return objective if z_loss is None else objective + z_loss * jnp.square(log_z)


def _sums(weights, objective, nll, correct):
    return TokenSums(*(jnp.sum(weights * term) for term in (objective, nll, correct, jnp.ones_like(nll))))


def penalty(
    params: PyTree, *, l1: Float[Array, ""] | float | None = None, l2: Float[Array, ""] | float | None = None
) -> Float[Array, ""]:
    """l1 sum |w| + l2/2 sum w^2 over the kernels, float32[]. None is off. A matrix of zeros adds nothing.

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
