"""Our own gradient transformations: functions `(arguments) -> optax.GradientTransformation`.

A name in a chain is looked up here first, then in optax. A parameter named `steps` is given the length of the run;
one named `inner`, the transform of all stages after it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxlm import tree  # not their functions: a function in this module is a transform
from jaxlm.errors import ConfigError
from jaxlm.optim import parts, scheduled, schedules
from jaxlm.optim.kronecker import scale_by_shampoo, scale_by_soap
from jaxlm.optim.muon import muon, scale_by_muon
from jaxlm.optim.parts import freeze, train_last_layers
from jaxlm.optim.wrappers import (
    ema_of_params,
    lookahead,
    mechanize,
    sam,
    schedule_free,
    skip_nonfinite,
    skip_spikes,
)

PyTree = Any

__all__ = [
    "cautious",
    "clip_by_global_norm",
    "ema_of_params",
    "freeze",
    "lookahead",
    "mechanize",
    "muon",
    "proximal_l1",
    "sam",
    "scale_by_layer",
    "scale_by_learning_rate",
    "scale_by_muon",
    "scale_by_shampoo",
    "scale_by_soap",
    "schedule_free",
    "skip_nonfinite",
    "skip_spikes",
    "train_last_layers",
]


def scale_by_learning_rate(
    peak: schedules.Number, steps: int, schedule: str = "constant", **arguments: Any
) -> optax.GradientTransformation:
    """u -> -learning_rate(count) u, where count starts at 0. See `scheduled.number` for the arguments."""
    rate = scheduled.number(peak, steps, schedule, **arguments)
    return optax.scale_by_schedule(lambda count: -rate(count))


def clip_by_global_norm(max_norm: ArrayLike) -> optax.GradientTransformation:
    """Clipping by the norm over all parameters (Pascanu et al. 2013, arXiv:1211.5063): u -> u min(1, max_norm / |u|).

    As optax's of this name up to rounding, which divides each number: then XLA:CPU writes all of them out once more.
    """

    def update(updates: PyTree, state: optax.OptState, params: PyTree | None = None) -> tuple[PyTree, optax.OptState]:
        del params
        norm = optax.tree.norm(updates)
        factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def cautious() -> optax.GradientTransformation:
    """Cautious updates (Liang et al. 2024, arXiv:2411.16085): no number moves against its own gradient.

        u -> m u / max(mean(m), 1e-3),  m = 1 where u g > 0, else 0

    The mean is over each parameter, of a layer's alone, where u is not 0, as it always is in the rows beyond the
    vocabulary that fill up wte; the floor is that of the authors' code. Comes between what shapes the update and the
    sign flip: ("scale_by_adam", "cautious", "add_decayed_weights", "scale_by_learning_rate") masks Adam's part, not the
    decay's. The gradient g is the extra argument `grad`. No state.
    """

    def update(
        updates: PyTree, state: optax.OptState, params: PyTree | None = None, *, grad: PyTree, **extra: Any
    ) -> tuple[PyTree, optax.OptState]:
        del params, extra

        def masked(key_path: tuple[Any, ...], u: Any, g: Any) -> Any:
            if parts.is_masked(u):
                return u
            mask = (u * g > 0).astype(u.dtype)
            total = functools.partial(jnp.sum, axis=range(tree.of_layers(key_path), u.ndim), keepdims=True)
            share = total(mask) / jnp.maximum(total((u != 0).astype(u.dtype)), 1)
            return u * mask / jnp.maximum(share, 1e-3)

        return jax.tree_util.tree_map_with_path(masked, updates, grad, is_leaf=parts.is_masked), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def proximal_l1(l1: ArrayLike, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Proximal gradient descent on loss + l1 |p|_1 (ISTA; Parikh and Boyd 2014, Proximal Algorithms, 4.2 and 6.5.2).

        p + u -> sign(p + u) max(|p + u| - learning_rate l1, 0)

    Comes last in a chain and takes the learning rate of the stage before it. Unlike a penalty in the loss it makes
    exact zeros, and Adam does not rescale it.
    """

    def init(params: PyTree) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))

    def update(
        updates: PyTree, state: optax.ScaleByScheduleState, params: PyTree
    ) -> tuple[PyTree, optax.ScaleByScheduleState]:
        threshold = l1 * (learning_rate(state.count) if callable(learning_rate) else learning_rate)

        def shrunk(u: jax.Array, p: jax.Array) -> jax.Array:
            moved = p + u
            return (jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - threshold, 0) - p).astype(u.dtype)

        return jax.tree.map(shrunk, updates, params), optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def scale_by_layer(decay: ArrayLike) -> optax.GradientTransformation:
    """Layer-wise learning rates for fine-tuning (ULMFiT, arXiv:1801.06146; ELECTRA, arXiv:2003.10555).

        layer l = 0 ... L - 1: u -> decay^(L - l) u;  embeddings: decay^(L + 1) u;  all else (ln_f, lm_head): u

    The powers are those of BEiT (arXiv:2106.08254); ELECTRA counts one more. A tied wte is an embedding. Comes after
    what forgets the scale of a gradient, such as Adam. Where only the last layers are seen, the extra argument
    `layers` is L. No state.

    Raises:
      ConfigError: at update, embeddings without layers: their number isn't known behind such a mask.
    """

    def update(
        updates: PyTree, state: optax.OptState, params: PyTree | None = None, *, layers: int = 0, **extra: Any
    ) -> tuple[PyTree, optax.OptState]:
        del params, extra
        layers = layers or tree.num_layers(updates)

        def scaled(key_path: tuple[Any, ...], u: jax.Array) -> jax.Array:
            power: Any = tree.below_head(tree.path_of(key_path), layers)
            if tree.of_layers(key_path):
                power = jnp.array(power[-len(u) :]).reshape(-1, *[1] * (u.ndim - 1))  # the last layers, if not all
            elif power == (0,):
                return u
            elif not layers:
                raise ConfigError("scale_by_layer sees embeddings but no layers (h/...); widen its 'where'")
            else:
                (power,) = power
            return (u * jnp.asarray(decay, jnp.float32) ** power).astype(u.dtype)

        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
