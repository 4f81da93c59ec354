"""Parameters of one model made to fit another vocabulary or context: tables cut at their end, or grown there."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.model.gpt2 import VOCAB_MULTIPLE

PyTree = Any


def resize(params: PyTree, old: Any, new: Any, key: jax.Array) -> tuple[PyTree, list[str]]:
    """Parameters of the `model` section `old` as those of `new`, which may differ in context_length and vocab_size.

    New positions are drawn from N(0, 0.02), as a model's first ones are. New ids all get the mean of the old ones: so
    the model begins with a probability for them that is none of the extremes (Hewitt 2021, "Initializing New Word
    Embeddings for Pretrained Language Models"). What pads the vocabulary is zero. Pure.

    Returns:
      the parameters, those that stay as they were untouched, and what was changed, as lines to say.
    """
    out, said = dict(params), []
    if old.context_length != new.context_length:
        table_TD, added = params["wpe"]["embedding"], max(0, new.context_length - old.context_length)
        drawn_TD = 0.02 * jax.random.normal(key, (added, table_TD.shape[1]))
        grown_TD = jnp.concatenate([table_TD[: new.context_length], drawn_TD.astype(table_TD.dtype)])
        out["wpe"] = {"embedding": grown_TD}
        said.append(_line("positions", old.context_length, new.context_length, "drawn from N(0, 0.02)"))
    if old.vocab_size != new.vocab_size:
        out["wte"] = {"embedding": _ids(params["wte"]["embedding"], old.vocab_size, new.vocab_size)}
        if "lm_head" in params:
            out["lm_head"] = {"kernel": _ids(params["lm_head"]["kernel"].T, old.vocab_size, new.vocab_size).T}
        said.append(_line("token ids", old.vocab_size, new.vocab_size, "each with the mean of the old ones"))
    return out, said


def _ids(table_VD: jax.Array, old: int, new: int) -> jax.Array:
    """A table of so many ids, and zeros up to the padded size."""
    kept_VD = table_VD[: min(old, new)]
    mean_D = jnp.mean(table_VD[:old], axis=0, dtype=jnp.float32).astype(table_VD.dtype)
    added_VD = jnp.broadcast_to(mean_D, (max(0, new - old), len(mean_D)))
    return jnp.pad(jnp.concatenate([kept_VD, added_VD]), ((0, -new % VOCAB_MULTIPLE), (0, 0)))


def _line(what: str, old: int, new: int, how: str) -> str:
    if new < old:
        return f"{what} cut from {old:,} to {new:,}: the last {old - new:,} are dropped"
    return f"{what} grown from {old:,} to {new:,}: {new - old:,} added, {how}"
