"""A model as the folder that Hugging Face's `save_pretrained` writes, for all that reads such folders."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxlm import config_json, files, redact
from jaxlm.data import tokenizer_export
from jaxlm.errors import ConfigError, DataError
from jaxlm.model import huggingface, lora
from jaxlm.training import card
from jaxlm.training.load import load_located


def export(checkpoint: str | Path, out: str | Path, weights: str = "") -> Path:
    """Writes config.json, generation_config.json, model.safetensors, tokenizer files and README.md, a model card;
    of a run, jaxlm_config.json too.

    Args:
      checkpoint, weights: as `jaxlm.load` takes them.
      out: a folder that is not there yet, or is empty. It appears whole or not at all.

    Returns:
      `out`, absolute.

    Raises:
      ConfigError: something lies at `out`, or that is no name; or there are no such weights.
      DataError: nothing to export is at `checkpoint`, or `out` can't be written.
    """
    if not str(out).strip():
        raise ConfigError("--out is empty; expected a folder that is not there yet, or is empty")
    out = files.expanded(out).resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out={str(out)!r} exists and is not an empty folder; remove it or give another")
    where, loaded = load_located(checkpoint, weights)
    section, tokenizer = loaded.config.model, loaded.tokenizer
    texts = tokenizer_export.files(tokenizer, section.context_length)
    texts["README.md"] = card.card(out.name, str(checkpoint), where, loaded, weights)
    if where.step is not None:
        texts[card.CONFIG] = redact.text(config_json.to_json(card.shown(loaded)))
    with _folder(out) as folder:
        ids = tokenizer_export.special_ids(tokenizer)
        huggingface.write(folder, lora.merged(loaded.params, section.lora), section, special_ids=ids)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    return out


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A folder next to `out` that takes its name when the block ends well, and otherwise goes."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(out)
    except OSError as error:
        raise DataError(
            f"{out} can't be written: {error.strerror or error}; give another --out or make room"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
