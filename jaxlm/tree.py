"""Parameter trees by path: "h/attn/c_attn/kernel". What a transform touches is decided by path, never by rank.

A stacked layer axis makes biases and norm scales rank 2, so "decay what has two dimensions" decays everything.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.errors import ConfigError

PyTree = Any

GROUPS = {
    "kernels": r"/kernel(/[ab])?$",
    "embeddings": r"(^|/)w[tp]e/embedding(/[ab])?$",
    "norms": r"(^|/)ln_\w+/(scale|bias)$",
    "biases": r"(?<!ln_1)(?<!ln_2)(?<!ln_f)/bias$",
    "all": r"",
}
"""The named masks. All but "all" are disjoint, and together they cover GPT-2, and the thin matrices a, b of low-rank
adaptation, which count with those that they are beside."""


def path_of(key_path: tuple[Any, ...]) -> str:
    """A JAX key path as "a/b/c"."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def of_layers(key_path: tuple[Any, ...]) -> bool:
    """Whether a parameter, or optimizer state of its shape, is stacked by layer: [L, ...]."""
    return _is_of_layers(path_of(key_path))


def num_layers(tree: PyTree) -> int:
    """L; 0 where nothing is stacked by layer."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return max((leaf.shape[0] for key_path, leaf in flat if of_layers(key_path)), default=0)


def below_head(path: str, layers: int) -> tuple[int, ...]:
    """How far below the head a parameter stands, or one of low rank beside it: layers (L, ..., 1), an embedding
    (L + 1,), all else (0,)."""
    if _is_of_layers(path):
        return tuple(range(layers, 0, -1))
    return (layers + 1,) if re.search(r"(^|/)w[tp]e/embedding(/|$)", path) else (0,)


def _is_of_layers(path: str) -> bool:
    return re.search(r"(^|/)h/", path) is not None


def paths(tree: PyTree) -> list[str]:
    """The paths of all leaves, in the tree's order."""
    return [path_of(key_path) for key_path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def pattern(where: str) -> re.Pattern[str]:
    """A named mask of `GROUPS`, or a regex to be searched for in paths; alternatives, a|b, may be names too.

    Raises:
      ConfigError: the regex does not compile.
    """
    try:
        return re.compile("|".join(GROUPS.get(part, part) for part in where.split("|")))
    except (re.error, TypeError, AttributeError) as error:
        raise ConfigError(f"where={where!r} is neither one of {', '.join(GROUPS)} nor a regex: {error}") from error


def of_group(path: str, *groups: str) -> bool:
    """Whether a parameter is in one of these groups of `GROUPS`."""
    return any(re.search(GROUPS[group], path) for group in groups)


def mask(tree: PyTree, where: str) -> PyTree:
    """A tree of bools like `tree`: True where the path matches.

    Args:
      tree: parameters, or anything shaped like them.
      where: as `pattern` takes it.

    Raises:
      ConfigError: nothing matches, or the regex does not compile.
    """
    regex = pattern(where)
    out = jax.tree_util.tree_map_with_path(lambda key_path, _: bool(regex.search(path_of(key_path))), tree)
    if not any(jax.tree.leaves(out)):
        known = ", ".join(paths(tree))
        raise ConfigError(f"where={where!r} matches no parameter; named masks: {', '.join(GROUPS)}; paths: {known}")
    return out


def size(tree: PyTree) -> int:
    """How many numbers a tree of arrays (or of their shapes) holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def float32(tree: PyTree) -> PyTree:
    """The same numbers in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm over all leaves, float32[]."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.float32(0)))
