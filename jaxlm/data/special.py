"""Special tokens that a text spells out: control tokens of a Hugging Face tokenizer, such as <|user|>.

Text of data is always text, so no document can say what only the operator may: there they stay the characters that they
are. In what the operator writes, a template of `data.prompt` or a prompt, they are tokens, as in transformers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from jaxlm.data.forms import Document, Filled
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import DataError

Spans = Sequence[tuple[int, int]]
"""(start, stop) of parts of a text, in their order."""


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text of the operator's.

    Raises:
      DataError: as `Tokenizer.encode`.
    """
    parts = parted(tokenizer, text, [(0, len(text))])
    return [i for part in parts for i in ([part] if isinstance(part, int) else tokenizer.encode(part).tolist())]


def parted(tokenizer: Tokenizer, text: str, own: Spans) -> Iterator[str | int]:
    """A text in parts: strings, and ids of the special tokens that its own spans spell out."""
    done, known = 0, tokenizer.special_tokens
    pattern = _pattern(tuple(known))
    for start, stop in own if known else ():
        for found in pattern.finditer(text, start, stop):
            token = known[found[0]]
            before = text[done : found.start()]
            if before := before.rstrip() if token.strips_left else before:
                yield before
            yield token.id
            done = found.end()
            while token.strips_right and text[done : done + 1].isspace():
                done += 1
    if rest := text[done:]:
        yield rest


@dataclass
class Spelled:
    """Documents whose data spells out a special token: not all their names, for it may be every one of a corpus."""

    number: int = 0
    first: str = ""  # its name, and the token


def watched(tokenizer: Tokenizer, documents: Iterable[Document], spelled: Spelled) -> Iterator[Document]:
    """The documents; those whose data spells out a special token are counted in `spelled`.

    Raises:
      DataError: the template itself spells out the end of text, which jaxlm puts where it belongs.
    """
    known = tokenizer.special_tokens
    pattern = _pattern(tuple(known))
    for document in documents if known else ():
        first = ""
        for text in (document.text, document.completion or ""):
            own = text.own if isinstance(text, Filled) else ()
            for found in pattern.finditer(text):
                if not any(start <= found.start() and found.end() <= stop for start, stop in own):
                    first = first or found[0]
                elif known[found[0]].id == tokenizer.end_of_text:
                    raise DataError(
                        f"a template of data.prompt or data.completion spells out {found[0]!r}, the tokenizer's end of "
                        "text; leave it out: one follows each completion, and a prompt can't hold one"
                    )
        if first:
            spelled.number += 1
            spelled.first = spelled.first or f"{document.name}: {first!r}"
        yield document
    if not known:
        yield from documents


@functools.lru_cache(maxsize=8)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """The longest where several begin at one place."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
