"""From a config's data section to token files, by way of a cache.

`open(cfg.data)` is the one way in: text is tokenized once and found again by the content of the text, the
tokenizer and the settings that shape the ids, so a cache entry can be used, shared or deleted without a thought.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxlm.data import cache, forms, heldout, mapped, sources, tokenizer_specs
from jaxlm.data.encoding import encoded
from jaxlm.data.forms import Document
from jaxlm.data.section import Section
from jaxlm.data.sources import Source
from jaxlm.data.tokenfile import FORMAT, Chunk, TokenFile, open_tokens, tokenizer_of, write
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import ConfigError, DataError

_PART = 4 * 2**20  # tokens looked at at once
_METHOD = 2  # of parting and encoding; goes up where the same text would become other tokens, or an error


class Data(NamedTuple):
    tokenizer: Tokenizer
    train: TokenFile
    validation: TokenFile | None


def open(section: Section, progress: bool = False) -> Data:
    """The tokens that a config's data section names: from the cache, or tokenized now and put there.

    Args:
      section: `cfg.data` of a resolved config. A `source` of NAME.bin is opened as it is, with its own tokenizer,
        or with the one given where it has no metadata; `validation` is then "", a share such as "5%" (its tail), or
        another .bin.
      progress: show a bar on a terminal.

    Raises:
      ConfigError: a `validation` or `tokenizer` that can't be, or a validation that is mostly in the source.
      DataError: data is missing, empty, damaged, or can't be read or cached.
    """
    share = heldout.share(section.validation)
    heldout.check_made(section.source, section.validation)
    files = [name for name in (section.source, section.validation) if name.endswith(".bin")]
    form = forms.of(section)
    if section.source in files:
        _no_pairs(section, section.source)
        return _open_files(section, share)
    if files:
        raise ConfigError(f"data.validation={files[0]!r} is a token file, data.source={section.source!r} is text")

    text = sources.open_source(section.source, form=form, errors=section.errors)
    other, shared = None, ""
    if section.validation and share is None:
        other = sources.open_source(section.validation, form=form, errors=section.errors)
        shared = heldout.overlap(text, other)
    held_out = other.fingerprint if other else share
    tokenizer = tokenizer_specs.key(section.tokenizer)
    what = [FORMAT, _METHOD, text.fingerprint, held_out, tokenizer, form.key, section.errors]
    names = ("validation", "train") if section.validation else ("train",)

    def build(entry: Path) -> None:
        _tell(text, other)
        if shared:
            print(shared, file=sys.stderr)
        _build(entry, section, text, other, share, progress and sys.stderr.isatty())

    split = cache.filled(section.cache_dir, what, names, build)
    return Data(tokenizer_of(split["train"].path), split["train"], split.get("validation"))


def tokenize(source: str, tokenizer: Tokenizer, section: Section, progress: bool = False) -> TokenFile:
    """Other text by a tokenizer that exists: to evaluate a model on. Cached as `open` does.

    Args:
      source: as `data.source`; a .bin file must be of this tokenizer.
      section: `cfg.data`, of which all but source, validation and tokenizer is read.

    Raises:
      DataError: the source is missing, empty, damaged, or of another tokenizer.
    """
    if source.endswith(".bin"):
        _no_pairs(section, source)
        file = open_tokens(source, tokenizer)
        if file.tokenizer != tokenizer.fingerprint:
            raise DataError(f"{source} was made by another tokenizer than the model's")
        return file
    form = forms.of(section)
    text = sources.open_source(source, form=form, errors=section.errors)

    def build(entry: Path) -> None:
        _tell(text)
        chunks = encoded(_tracked(text, "tokenizing", progress and sys.stderr.isatty()), tokenizer)
        write(entry / "text.bin", _if_unchanged(chunks, section, text), tokenizer, text.fingerprint)

    what = [FORMAT, _METHOD, text.fingerprint, tokenizer.fingerprint, form.key, section.errors]
    return cache.filled(section.cache_dir, what, ("text",), build)["text"]


def _tell(*read: Source | None) -> None:
    for source in read:
        if source and source.left_out:
            print(f"note: of {source.spec}, {source.left_out}", file=sys.stderr)


def _build(
    entry: Path, section: Section, text: Source, other: Source | None, share: float | None, progress: bool
) -> None:
    train, validation = heldout.split(text, share) if share is not None else (text, other)
    splits = [train] if validation is None else [validation, train]

    def corpus() -> Iterator[str]:
        # A character that only validation has must have an id as well; what BPE merges is learnt from train alone.
        for split in splits if section.tokenizer == "chars" else [train]:
            for document in _tracked(split, f"building {section.tokenizer}", progress):
                yield document.text
                if document.completion is not None:
                    yield document.completion

    tokenizer = tokenizer_specs.build(section.tokenizer, corpus())
    for split in splits:
        name = "train" if split is train else "validation"
        chunks = encoded(_tracked(split, f"tokenizing {name}", progress), tokenizer)
        if split is train:  # the last, which completes the entry
            chunks = _if_unchanged(chunks, section, *filter(None, (text, other)))
        write(entry / f"{name}.bin", chunks, tokenizer, split.fingerprint)


def _if_unchanged(chunks: Iterator[Chunk], section: Section, *read: Source) -> Iterator[Chunk]:
    """`chunks`, and an error at their end where a source is no more what the key of the cache says."""
    yield from chunks
    for source in read:
        now = sources.open_source(source.spec, form=forms.of(section), errors=section.errors)
        if now.fingerprint != source.fingerprint:
            raise sources.changed(source.spec)


def _tracked(source: Source, what: str, progress: bool) -> Iterator[Document]:
    """The documents of a source, behind a bar of the text seen."""
    if not progress:
        yield from source.read()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=source.num_bytes or None)
        for document in source.read():
            yield document
            bar.advance(task, len(document.text) + len(document.completion or ""))


# A .bin file as the source


def _no_pairs(section: Section, path: str) -> None:
    if section.format == "pairs":
        raise ConfigError(
            f"{path} is a token file, which holds text; data.format='pairs' reads rows of .jsonl, .csv, "
            ".parquet or hf://"
        )


def _open_files(section: Section, share: float | None) -> Data:
    spec, path = section.tokenizer, section.source
    given = None
    if not (spec == "bytes" or spec == "chars" or spec.startswith("bpe:")):  # bytes are the default, which is no wish
        given = tokenizer_specs.build(spec)
    train = open_tokens(path, given)
    if spec != "bytes" and (given is None or given.fingerprint != train.tokenizer):
        raise DataError(
            f"data.tokenizer={spec!r} is not the tokenizer that made {path}; a token file with its metadata brings its "
            "own: leave data.tokenizer at 'bytes'"
        )
    tokenizer = given or tokenizer_of(path)
    if not section.validation:
        return Data(tokenizer, train, None)
    if share is not None:
        return Data(tokenizer, *_parted(train, share, tokenizer))
    if not section.validation.endswith(".bin"):
        raise ConfigError(
            f"data.validation is {section.validation!r}; with a token file as data.source expected a share "
            "such as '5%', another .bin file, or ''"
        )
    validation = open_tokens(section.validation, given)
    if validation.tokenizer != train.tokenizer:
        raise DataError(f"{section.validation} and {section.source} were made by different tokenizers")
    return Data(tokenizer, train, validation)


def _parted(file: TokenFile, share: float, tokenizer: Tokenizer) -> tuple[TokenFile, TokenFile]:
    """(train, tail) of a token file, cut at the document's end nearest to the share, if one is near."""
    size = file.num_tokens
    if size < 2:
        raise DataError(f'{file.path} holds a single token: nothing to hold out; set data.validation=""')
    tail = min(max(round(size * share), 1), size - 1)
    cut = size - tail
    low = max(cut - tail // 2, 1)
    ends = low + np.flatnonzero(file.tokens[low - 1 : min(cut + tail // 2, size - 1)] == tokenizer.end_of_text)
    if len(ends):
        cut = int(ends[np.argmin(np.abs(ends - cut))])
    held = file.tokens[cut:]
    num_bytes = num_documents = 0
    for first in range(0, len(held), _PART):
        part = held[first : first + _PART]
        mapped.check_ids(held, part[None], [first])
        num_bytes += int(tokenizer.byte_lengths[part].sum(dtype=np.int64))
        num_documents += int(np.count_nonzero(part == tokenizer.end_of_text))

    def view(tokens: np.ndarray, side: str, num_bytes: int, num_documents: int) -> TokenFile:
        sha256 = hashlib.sha256(f"{file.sha256}:{cut}:{side}".encode()).hexdigest()
        return file._replace(tokens=tokens, sha256=sha256, num_bytes=num_bytes, num_documents=num_documents)

    train = view(file.tokens[:cut], "train", file.num_bytes - num_bytes, file.num_documents - num_documents)
    return train, view(held, "held out", num_bytes, num_documents)
