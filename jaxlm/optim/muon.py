"""Muon on the matrices of GPT-2's layers, chosen by path.

`optax.contrib.muon` by itself takes what has rank 2: of stacked layers that is every bias, norm scale and embedding,
and none of the kernels [L, in, out].
"""

from __future__ import annotations

import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.typing import ArrayLike

from jaxlm import tree
from jaxlm.errors import ConfigError

PyTree = Any
Preconditioning = Literal["frobenius", "spectral", "aol", "schatten"]

HIDDEN = "^h/.*kernel$"
QUERY_KEY_VALUE = "/c_attn/kernel$"
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def scale_by_muon(
    ns_coeffs: tuple[float, ...] | tuple[tuple[float, ...], ...] = COEFFICIENTS,
    ns_steps: int = 5,
    beta: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    nesterov: bool = True,
    preconditioning: Preconditioning = "frobenius",
    consistent_rms: ArrayLike | None = None,
    split_attention: bool = True,
) -> optax.GradientTransformation:
    """Momentum, orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon), of each layer's matrices.

        M = beta M + (1 - beta) G;  X = the momentum (with nesterov, of one step ahead), bias-corrected, over |X|_F
        ns_steps times: X = a X + b (X Xᵀ) X + c (X Xᵀ)² X, with ns_coeffs = (a, b, c)
        u = X sqrt(max(1, out / in)), or X sqrt(max(in, out)) consistent_rms (Liu et al. 2025, arXiv:2502.16982)

    `optax.contrib.scale_by_muon` does the work but for the last line. Its argument `adaptive` is not here: its norm
    would be that of all layers together. The bias corrections are optax's; the author has none. The momentum takes 1
    number per parameter.

    Args:
      preconditioning: what X is divided by at first, see optax. "spectral" is an SVD, and can hang on the CPU as
        described in `kronecker._one_by_one`.
      consistent_rms: the root mean square of an update; 0.2 makes learning rates and decays those of Adam.
      split_attention: whether c_attn [D, 3D] is three matrices, of queries, keys and values, as the author does it
        (github.com/KellerJordan/modded-nanogpt); else one. The state keeps it as it is used: [3, L, D, D].

    Raises:
      ConfigError: at init and update, a parameter other than the layers' kernels.
    """
    inner = optax.contrib.scale_by_muon(
        ns_coeffs=ns_coeffs,
        ns_steps=ns_steps,
        beta=beta,
        eps=eps,
        nesterov=nesterov,
        preconditioning=preconditioning,
        weight_dimension_numbers=lambda updates: jax.tree.map(
            lambda _: optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1), updates
        ),
    )

    def matrices(updates: PyTree) -> PyTree:
        """Leaves [..., in, out]."""

        def split(key_path: tuple[Any, ...], x: jax.Array) -> jax.Array:
            path = tree.path_of(key_path)
            if not re.search(HIDDEN, path):
                raise ConfigError(
                    f"Muon is for the kernels of layers, and {path!r} is none: give scale_by_muon where={HIDDEN!r} "
                    "and the other parameters another stage, or take 'muon', which leaves them to Adam"
                )
            return jnp.stack(jnp.split(x, 3, axis=-1)) if split_attention and re.search(QUERY_KEY_VALUE, path) else x

        return jax.tree_util.tree_map_with_path(split, updates)

    def scaled(x: jax.Array, update: jax.Array) -> jax.Array:
        """The update of matrices `x` in the form of the parameter's own."""
        fan_in, fan_out = x.shape[-2:]
        scale = max(1, fan_out / fan_in) ** 0.5
        if consistent_rms is not None:
            scale = max(fan_in, fan_out) ** 0.5 * consistent_rms
        x = x if x.ndim == update.ndim else jnp.concatenate(list(x), axis=-1)
        return (scale * x).astype(update.dtype)

    def init(params: PyTree) -> optax.OptState:
        return inner.init(matrices(params))

    def update(updates: PyTree, state: optax.OptState, params: PyTree | None = None) -> tuple[PyTree, optax.OptState]:
        del params
        out, state = inner.update(matrices(updates), state)
        return jax.tree.map(scaled, out, updates), state

    return optax.GradientTransformation(init, update)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    ns_coeffs: tuple[float, ...] | tuple[tuple[float, ...], ...] = COEFFICIENTS,
    ns_steps: int = 5,
    beta: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    nesterov: bool = True,
    preconditioning: Preconditioning = "frobenius",
    consistent_rms: ArrayLike | None = None,
    split_attention: bool = True,
    adam_b1: ArrayLike = 0.9,
    adam_b2: ArrayLike = 0.999,
    adam_eps_root: ArrayLike = 0.0,
    adam_weight_decay: ArrayLike = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformation:
    """`optax.contrib.muon` with the kernels of layers as Muon's (see `scale_by_muon`), and AdamW for all others.

    Two moments per parameter of Adam's, one of Muon's. As in optax Adam has Muon's `eps` and `nesterov`.

    Args:
      weight_decay: of Muon's kernels, times the learning rate.
      adam_weight_decay: of embeddings and lm_head, times Adam's learning rate; norms and biases are not decayed.
      adam_learning_rate: Muon's, if None.
    """

    def labels(params: PyTree) -> PyTree:
        return _matching(params, HIDDEN, lambda hidden: "muon" if hidden else "adam")

    orthogonal = optax.chain(
        scale_by_muon(ns_coeffs, ns_steps, beta, eps, nesterov, preconditioning, consistent_rms, split_attention),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    adam = optax.adamw(
        learning_rate if adam_learning_rate is None else adam_learning_rate,
        b1=adam_b1,
        b2=adam_b2,
        eps=eps,
        eps_root=adam_eps_root,
        weight_decay=adam_weight_decay,
        mask=lambda params: _matching(params, "/(embedding|kernel)$", bool),
        nesterov=nesterov,
    )
    return optax.partition({"muon": orthogonal, "adam": adam}, labels)


def _matching(params: PyTree, where: str, label: Any) -> PyTree:
    return jax.tree_util.tree_map_with_path(
        lambda key_path, _: label(re.search(where, tree.path_of(key_path)) is not None), params
    )
