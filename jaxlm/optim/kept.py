"""What a transform must keep for a run to go on with it, checked as it is traced; and whose mistake it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm import tree
from jaxlm.errors import ConfigError, JaxlmError

PyTree = Any


class StageError(ConfigError):
    """A stage's own function raised something."""


def kept(stage: str, transform: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The transform of a stage, whose update has to give back the shapes that it is given.

    Another kind of state could be trained with, but no checkpoint of it restored; another shape of updates would be
    broadcast over the parameters. All of this costs nothing but time to trace.

    Raises:
      ConfigError: at update, the state has another structure, shape or dtype, or the updates another structure or
        shape than before.
      StageError: at init and update, whatever else is raised there.
    """
    transform = optax.with_extra_args_support(transform)

    def named(act: Callable[..., Any], *arguments: Any, **extra: Any) -> Any:
        try:
            return act(*arguments, **extra)
        except JaxlmError:
            raise
        except Exception as error:
            raise StageError(f"optimizer stage {stage!r} raised {type(error).__name__}: {error}") from error

    def init(params: PyTree) -> optax.OptState:
        return named(transform.init, params)

    def update(
        updates: PyTree, state: optax.OptState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, optax.OptState]:
        out, after = named(transform.update, updates, state, params, **extra)
        for what, old, new, kind in (("updates", updates, out, _shape), ("state", state, after, _kind)):
            if changed := named(_changed, old, new, kind):
                raise ConfigError(
                    f"optimizer stage {stage!r}: its update gives back {changed}; expected {what} of the same "
                    "structure, shapes and dtypes as it is given"
                )
        return out, after

    return optax.GradientTransformationExtraArgs(init, update)


def _changed(old: PyTree, new: PyTree, kind: Callable[[Any], str]) -> str:
    """How a tree differs from what it was, in words; "" where structure and kinds of leaves are the same."""
    before, after = (dict(zip(tree.paths(x), map(kind, jax.tree.leaves(x)), strict=True)) for x in (old, new))
    for path in {**before, **after}:
        if before.get(path) != after.get(path):
            where = f" as {path!r}" if path else ""
            return f"{after.get(path, 'nothing')}{where}, given {before.get(path, 'nothing')}"
    structures: list[Any] = [jax.tree.structure(old), jax.tree.structure(new)]
    return "" if structures[0] == structures[1] else f"{structures[1]}, given {structures[0]}"


def _shape(leaf: Any) -> str:
    return str(list(jnp.shape(leaf)))


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype if hasattr(leaf, 'dtype') else jnp.result_type(leaf)}{_shape(leaf)}"
