"""Wrappers that train a part of the parameters: what is inside of them sees only that part."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm import tree
from jaxlm.errors import ConfigError

PyTree = Any


def freeze(inner: optax.GradientTransformation, where: str) -> optax.GradientTransformationExtraArgs:
    """Parameters that match `where` never change and use no optimizer memory; inner sees only the others.

    So a global norm inside is that of the trained parameters, and `value_fn` inside a function of them.

    Args:
      where: a named mask or a regex over paths.

    Raises:
      ConfigError: at init and update, `where` matches nothing or everything.
    """

    def labels(params: PyTree) -> PyTree:
        frozen = tree.mask(params, where)
        if all(jax.tree.leaves(frozen)):
            raise nothing_left(where)
        return jax.tree.map(lambda is_frozen: "frozen" if is_frozen else "trained", frozen)

    return of_part(
        optax.partition({"trained": inner, "frozen": optax.set_to_zero()}, labels, mask_compatible_extra_args=True)
    )


def nothing_left(where: str) -> ConfigError:
    """The error for a `freeze` of everything."""
    return ConfigError(f"freeze: where={where!r} matches all parameters and leaves nothing to train")


def train_last_layers(inner: optax.GradientTransformation, count: int) -> optax.GradientTransformationExtraArgs:
    """Of the layers ("h/..."), only the last `count` change and have optimizer memory; inner sees no others.

    All that is shaped like the gradient is cut with it, and the extra argument `layers` says how many there are.

    What is in no layer, embeddings and the last norm, trains as well: `freeze` leaves it alone.

    Raises:
      ConfigError: at init and update, there are no layers, or fewer than `count`.
    """

    def last(x: PyTree) -> PyTree:
        def cut(key_path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
            return leaf[-count:] if tree.of_layers(key_path) else leaf

        return jax.tree_util.tree_map_with_path(cut, x)

    def checked(params: PyTree) -> int:
        layers = tree.num_layers(params)
        if not layers:
            raise ConfigError("train_last_layers: there are no layers (h/...) here")
        if not 0 < count <= layers:
            raise ConfigError(f"train_last_layers: count={count}; expected 1 to {layers}, the layers there are")
        return layers

    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> optax.OptState:
        checked(params)
        return inner.init(last(params))

    def update(
        updates: PyTree, state: optax.OptState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.OptState]:
        extra = {"layers": checked(updates), **_of_part(extra, params)}
        like: Any = jax.tree.structure(updates)
        extra = {name: last(value) if jax.tree.structure(value) == like else value for name, value in extra.items()}
        part = None if params is None else last(params)
        changed, state = inner.update(last(updates), state, part, **extra)
        return filled(changed, jax.tree.map(jnp.zeros_like, updates)), state

    return optax.GradientTransformationExtraArgs(init, update)


def of_part(masked: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """What shows a part of the parameters to those inside of it: functions of all are made functions of the part.

    So `value_fn` of `optax.masked` and `optax.partition` may be called inside: the others stand as they are.
    """
    masked = optax.with_extra_args_support(masked)

    def update(
        updates: PyTree, state: optax.OptState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.OptState]:
        return masked.update(updates, state, params, **_of_part(extra, params))

    return optax.GradientTransformationExtraArgs(masked.init, update)


def _of_part(extra: dict[str, Any], params: PyTree) -> dict[str, Any]:
    def partial(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # line searches look at what their function takes
        def of_part(part: PyTree, *rest: Any, **named: Any) -> Any:
            return function(filled(part, params), *rest, **named)

        return of_part

    return {name: partial(value) if callable(value) else value for name, value in extra.items()}


def is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def part_of(whole: PyTree, part: PyTree) -> PyTree:
    """`whole`, without what is masked in `part` and the layers before those it has."""

    def cut(own: Any, other: jax.Array) -> Any:
        return own if is_masked(own) else other if own.shape == other.shape else other[-len(own) :]

    return jax.tree.map(cut, part, whole, is_leaf=is_masked)


def filled(part: PyTree, whole: PyTree) -> PyTree:
    """`part`, with what is masked in it, the layers before those it has, and all dtypes, from `whole`."""

    def fill(own: Any, other: jax.Array) -> jax.Array:
        if is_masked(own):
            return other
        own = own.astype(other.dtype)
        return own if own.shape == other.shape else jnp.concatenate([other[: -len(own)], own])

    return jax.tree.map(fill, part, whole, is_leaf=is_masked)
