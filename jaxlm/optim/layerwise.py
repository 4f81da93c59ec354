"""Optax's transforms that look at a matrix as a whole, given each layer's matrices by themselves.

GPT-2's layers are stacked, [L, ...]. A norm or a mean of such an array would be that of all layers together, and what
decides by rank would take stacked biases for matrices.
"""

from __future__ import annotations

from typing import Any

import jax
import optax

from jaxlm import tree

PyTree = Any

OF_A_MATRIX = (
    # a norm, a mean or a sum over each parameter
    *(optax.clip_by_block_rms, optax.scale_by_param_block_norm, optax.scale_by_param_block_rms),
    *(optax.scale_by_trust_ratio, optax.lamb, optax.lars, optax.fromage),
    *(optax.scale_by_novograd, optax.novograd, optax.scale_by_distance_over_gradients),
    # over rows and columns, of what has the rank of a matrix
    *(optax.adaptive_grad_clip, optax.centralize),
    *(optax.scale_by_factored_rms, optax.adafactor, optax.scale_by_sm3, optax.sm3),
)
"""All others of optax go number by number, or take one norm of all parameters; but for Muon, of which there is our own,
and GaLore, whose SVDs of several layers at a time can hang on the CPU (see `kronecker._one_by_one`)."""


def layer_by_layer(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """A transform that sees the parameters of one layer where there are stacked ones, [L, ...] under "h/".

    It is vmapped over layers; all else, counts of steps too, is there once. Its state has the paths that it would
    have, and [L, ...] below "h/". Nothing for a layer may change what lies outside of the layers: no global norms.
    """

    def axes(x: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda key_path, _: 0 if tree.of_layers(key_path) else None, x)

    def first(x: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda key_path, leaf: leaf[0] if tree.of_layers(key_path) else leaf, x)

    def init(params: PyTree) -> optax.OptState:
        if not tree.num_layers(params):
            return transform.init(params)
        state = jax.eval_shape(lambda params: transform.init(first(params)), params)
        return jax.vmap(transform.init, (axes(params),), axes(state))(params)

    def update(updates: PyTree, state: optax.OptState, params: PyTree | None = None) -> tuple[PyTree, optax.OptState]:
        if not tree.num_layers(updates):
            return transform.update(updates, state, params)
        here = axes(updates), axes(state)
        return jax.vmap(transform.update, (*here, axes(params)), here)(updates, state, params)

    return optax.GradientTransformation(init, update)
