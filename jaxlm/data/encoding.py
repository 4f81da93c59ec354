"""Documents as token ids."""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterable, Iterator

import numpy as np

from jaxlm.data import cutting, forms, special
from jaxlm.data.forms import Document
from jaxlm.data.tokenfile import Chunk
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import DataError

_CHUNK = 4 * 2**20  # characters encoded at once


def encoded(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[Chunk]:
    """Token ids of documents, some megabytes of text at a time. Each ends in end of text, and of a pair the prompt does
    too: so a pair's tokens say where it is parted.

    Raises:
      DataError: a text has characters that the tokenizer doesn't know, or what it takes for the end of text; names the
        document.
    """
    seen: list[Document] = []  # those of a group, for the error
    spelled = special.Spelled()

    def parts(text: str) -> Iterator[str | int]:
        for part in special.parted(tokenizer, text, text.own if isinstance(text, forms.Filled) else ()):
            yield from [part] if isinstance(part, int) else tokenizer.pieces(part)

    def pieces() -> Iterator[str | int | _End]:
        for document in special.watched(tokenizer, documents, spelled):
            seen.append(document)
            yield from parts(document.text)
            if document.completion is not None:
                yield _End.PROMPT
                yield from parts(document.completion)
            yield _End.DOCUMENT

    def id_of(piece: int | _End) -> np.ndarray:
        return np.array([piece if isinstance(piece, int) else tokenizer.end_of_text], tokenizer.dtype)

    for group in cutting.grouped(pieces(), lambda piece: len(piece) if isinstance(piece, str) else 0, _CHUNK):
        texts = [piece for piece in group if isinstance(piece, str)]
        try:
            encoded = iter([_without_end(tokenizer, ids) for ids in tokenizer.encode_batch(texts)])
        except DataError:
            _name_fault(tokenizer, seen)
            raise
        del seen[:-1]  # the last one may go on in the next group
        ids = np.concatenate([next(encoded) if isinstance(piece, str) else id_of(piece) for piece in group])
        of_special = sum(int(tokenizer.byte_lengths[piece]) for piece in group if isinstance(piece, int))
        yield Chunk(ids, sum(len(text.encode()) for text in texts) + of_special, group.count(_End.DOCUMENT))
    if spelled.number:
        print(
            f"warning: {spelled.number:,} documents spell out a special token of the tokenizer, at first "
            f"{spelled.first}: in data it is encoded as the characters that it is, in data.prompt and data.completion "
            "as the token",
            file=sys.stderr,
        )


def _name_fault(tokenizer: Tokenizer, documents: Iterable[Document]) -> None:
    """The error of the first document that can't be encoded, with its name; a position is that in the document."""
    for document in documents:
        try:
            for text in (document.text, document.completion or ""):
                _without_end(tokenizer, tokenizer.encode(text))
        except DataError as error:
            raise DataError(f"{document.name}: {error}") from error


def _without_end(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """`ids` of a text, which may not end a document: some tokenizers have the end of text among the words they know."""
    if (ids == tokenizer.end_of_text).any():
        raise DataError(
            f"the text holds what the tokenizer takes for its end of text, id {tokenizer.end_of_text}, and would be "
            "parted there; take it out of the text, or use a tokenizer that has it as a special token"
        )
    return ids


class _End(enum.Enum):
    PROMPT = enum.auto()
    DOCUMENT = enum.auto()
