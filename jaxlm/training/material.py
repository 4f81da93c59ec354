"""What a run is made of: the batches that it trains on, those held out, what is asked there, and what is said of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import FrozenConfigDict

from jaxlm import data
from jaxlm.data import heldout
from jaxlm.data.batches import Batch
from jaxlm.evals import asking


class Material(NamedTuple):
    batches: data.Batches
    tokens: str  # sha256 of the training tokens
    held_out: str  # sha256 of the held-out tokens; "" without any
    validation: Sequence[Batch] | None  # what is evaluated; None where nothing is
    bytes_per_token: float  # there
    ask: Callable[[Any, Mapping[str, float]], dict[str, float]] | None  # the config's tasks
    said: list[str]


def of(cfg: FrozenConfigDict, opened: data.Data) -> Material:
    """That of a config and its data.

    Raises:
      DataError: as `data.training` and `data.held_out`.
    """
    T, section, held = cfg.model.context_length, cfg.data, opened.validation
    batches, note = data.training(section, opened, T, cfg.seed)
    said = [note] if note else []
    if held is None:
        return Material(batches, opened.train.sha256, "", None, math.nan, None, said)
    kind = "pair" if section.format == "pairs" else "document"
    whose = section.source if section.validation.endswith("%") else section.validation
    count = f"{held.num_documents:,} {kind}{'s' if held.num_documents != 1 else ''}"
    said.append(f"held out: {count}, {held.num_tokens:,} tokens, of {whose}")
    if missed := heldout.warning(section.validation, held.num_bytes, opened.train.num_bytes + held.num_bytes):
        said.append(missed)
    if held.sha256 == opened.train.sha256:
        said.append("warning: data.validation is the text of data.source, so eval/loss tells what is memorised")
    validation, bytes_per_token = None, math.nan
    if cfg.eval.every:
        validation, bytes_per_token = data.held_out(
            section, opened.tokenizer, held, T, section.batch_size, cfg.eval.batches
        )
    ask = asking.asker(cfg, opened.tokenizer, held) if cfg.eval.tasks else None
    return Material(batches, opened.train.sha256, held.sha256, validation, bytes_per_token, ask, said)
