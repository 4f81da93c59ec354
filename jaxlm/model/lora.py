"""Low-rank adaptation: beside chosen matrices W the product of two thin ones, W + alpha / rank * a b (Hu et al. 2021,
arXiv:2106.09685). They lie in the parameters under "lora/PATH OF W"; W itself stays as it is where the optimizer
freezes it: `freeze = {"where": "^(?!lora/)"}`.

Shape letters: ... stacked layers, M rows, N columns of a matrix, R rank.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import tree
from jaxlm.errors import ConfigError

PyTree = Any
KEY = "lora"


def added(params: PyTree, section: Any, key: jax.Array, vocab_size: int) -> PyTree:
    """The parameters with a [..., M, R], normal with standard deviation 1/sqrt(3 M), and b [..., R, N], zero: so that
    the function is what it was. As they are where the rank is 0.

    Args:
      section: `model.lora` of a config.
      vocab_size: rows of wte's `a` from this one on are zero, as the ids are that pad the vocabulary.

    Raises:
      ConfigError: `where` matches nothing, or what is no matrix.
    """
    if not section.rank:
        return params
    thin: dict[str, Any] = {}
    chosen = jax.tree.leaves(tree.mask(params, section.where))
    for number, (path, w, on) in enumerate(zip(tree.paths(params), jax.tree.leaves(params), chosen, strict=True)):
        if not on:
            continue
        if path.rpartition("/")[2] not in ("kernel", "embedding"):
            raise ConfigError(
                f"model.lora.where={section.where!r} matches {path}, which is no matrix; end it in 'kernel$'"
            )
        *layers, rows, columns = w.shape
        a = jax.random.normal(jax.random.fold_in(key, number), (*layers, rows, section.rank), w.dtype)
        if path == "wte/embedding":
            a = a.at[vocab_size:].set(0)
        node = thin
        for name in path.split("/"):
            node = node.setdefault(name, {})
        node |= {"a": a * (3 * rows) ** -0.5, "b": jnp.zeros((*layers, section.rank, columns), w.dtype)}
    return params | {KEY: thin}


def merged(params: PyTree, section: Any) -> PyTree:
    """The parameters of the same function without such products: each is added to its matrix."""
    if KEY not in params:
        return params

    def merge(w: Any, thin: Any) -> Any:
        if not isinstance(w, dict):
            return w + (section.alpha / section.rank * (thin["a"] @ thin["b"])).astype(w.dtype)
        return {name: merge(part, thin[name]) if name in thin else part for name, part in w.items()}

    return merge({name: part for name, part in params.items() if name != KEY}, params[KEY])
