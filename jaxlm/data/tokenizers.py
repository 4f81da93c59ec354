"""Text to token ids and back: bytes, characters, or any Hugging Face tokenizer, such as byte-level BPE.

A tokenizer is a value: `to_json` holds all of it, `from_json` gives it back equal, `fingerprint` names it. Text is
always text: an end-of-text token spelled out in a document does not end it. What an operator writes is `special`'s
story.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxlm.data import cutting
from jaxlm.data.tokenizer_trial import load, panics, trial
from jaxlm.errors import DataError

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
CODE_POINTS = 0x110000  # of Unicode

_GROUP = 2**23  # characters encoded in parallel


class Special(NamedTuple):
    """A control token, which no text of data becomes."""

    id: int
    strips_left: bool  # it takes the white space before it
    strips_right: bool  # and after it


class Tokenizer(ABC):
    """Ids are 0, ..., vocab_size - 1; one of them ends a document and stands for no text."""

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @property
    @abstractmethod
    def end_of_text(self) -> int:
        """The id after each document."""

    @property
    def special_tokens(self) -> dict[str, Special]:
        """By how they are spelled. `encode` takes them for the text that they are; see `jaxlm.data.special`."""
        return {}

    @cached_property
    @abstractmethod
    def byte_lengths(self) -> np.ndarray:
        """int32[vocab_size]: UTF-8 bytes of text that each id stands for; 0 for the end of text.

        Summed over token ids it gives the bytes that they cover, for bits per byte. Exact for bytes, characters and
        byte-level BPE. Other Hugging Face tokenizers may change text before they encode it: there a word counts with
        its space, and "##ing" as three bytes.
        """

    @property
    def unknown(self) -> int | None:
        """The id that takes the place of text which has none of its own; None where all text has."""
        return None

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """`dtype`[N] ids of a text, with no special tokens added.

        Raises:
          DataError: the text has surrogates, or characters that the tokenizer doesn't know and has no `unknown` for.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of integer ids [N], without end-of-text tokens; U+FFFD where the bytes are not UTF-8.

        Raises:
          DataError: an id outside of the vocabulary.
        """

    def decode_on(self, ids: Sequence[int] | np.ndarray) -> str:
        """`decode` of ids that go on from other text: with the space before them that some decoders drop from a
        text's start."""
        return self.decode(ids)

    @abstractmethod
    def to_json(self) -> str:
        """All of the tokenizer, for `from_json`."""

    def pieces(self, text: str) -> Iterator[str]:
        """A long text in parts: their ids, joined, are those of the whole, and take less memory on the way."""
        return cutting.equal(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, in parallel where that is faster."""
        return [self.encode(text) for text in texts]

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint16 if all ids fit, else uint32; little-endian."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what `to_json` says of ids."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def _text_ids(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """`ids` in range, as int64[N], less end-of-text tokens."""
        array = np.asarray(ids, np.int64).reshape(-1)
        outside = array[(array < 0) | (array >= self.vocab_size)]
        if len(outside):
            raise DataError(f"token id {outside[0]} is outside of the vocabulary of {self.vocab_size}")
        return array[array != self.end_of_text]


@dataclass(frozen=True)
class Bytes(Tokenizer):
    """The UTF-8 bytes of the text; 256 ends it."""

    @property
    def vocab_size(self) -> int:
        return 257

    @property
    def end_of_text(self) -> int:
        return 256

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        return np.array([1] * 256 + [0], np.int32)

    def encode(self, text: str) -> np.ndarray:
        with _surrogates(text):
            return np.frombuffer(text.encode(), np.uint8).astype(self.dtype)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._text_ids(ids).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def to_json(self) -> str:
        return json.dumps({"kind": "bytes"})


@dataclass(frozen=True)
class Chars(Tokenizer):
    """Each known character is a token, in the order of `characters`; the last id ends the text."""

    characters: str

    @property
    def vocab_size(self) -> int:
        return len(self.characters) + 1

    @property
    def end_of_text(self) -> int:
        return len(self.characters)

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        return np.array([len(c.encode()) for c in self.characters] + [0], np.int32)

    @cached_property
    def _ids(self) -> np.ndarray:
        """int32[code points]: the id of each, or -1."""
        table = np.full(CODE_POINTS, -1, np.int32)
        table[code_points(self.characters)] = np.arange(len(self.characters))
        return table

    def encode(self, text: str) -> np.ndarray:
        ids = self._ids[code_points(text)]
        if ids.min(initial=0) < 0:
            at = int(np.argmin(ids))
            raise DataError(
                f"character {text[at]!r} at position {at} is not among the {len(self.characters)} known ones"
            )
        return ids.astype(self.dtype)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return code_points(self.characters)[self._text_ids(ids)].tobytes().decode("utf-32-le")

    def to_json(self) -> str:
        return json.dumps({"kind": "chars", "characters": self.characters})


@dataclass(frozen=True)
class HuggingFace(Tokenizer):
    """A tokenizer of the `tokenizers` library, from the text of its tokenizer.json and the name of its last token.

    Special tokens in a text are encoded as the text that they are; padding, truncation and random (dropout)
    segmentation, if the file asks for them, are off.
    """

    tokenizer_json: str
    end_token: str
    settings: str = "{}"  # JSON: what transformers calls its tokens, and its chat template; for an export

    @cached_property
    def _live(self) -> tokenizers.Tokenizer:
        return load(self.tokenizer_json)

    @cached_property
    def vocab_size(self) -> int:
        return max(self._live.get_vocab(with_added_tokens=True).values(), default=-1) + 1  # ids may have gaps

    @cached_property
    def end_of_text(self) -> int:
        found = self._live.token_to_id(self.end_token)
        if found is None:
            raise DataError(f"the tokenizer has no token {self.end_token!r} to end a text with")
        return found

    def id_of(self, token: str) -> int | None:
        """Of a token by its name; None where there is none."""
        return self._live.token_to_id(token)

    @cached_property
    def special_tokens(self) -> dict[str, Special]:
        added = self._live.get_added_tokens_decoder().items()
        return {token.content: Special(i, token.lstrip, token.rstrip) for i, token in added if token.special}

    @cached_property
    def _byte_level(self) -> bool:
        """Whether tokens are spelled in the 256 printable characters that stand for bytes."""
        return '"ByteLevel"' in json.dumps(json.loads(self.tokenizer_json).get("decoder"))

    @cached_property
    def unknown(self) -> int | None:
        model = json.loads(self.tokenizer_json)["model"]
        found = model.get("unk_id")  # of Unigram; all others have a token
        if found is None and model.get("unk_token"):
            found = self._live.token_to_id(model["unk_token"])
        return None if found == self.end_of_text else found

    @cached_property
    def _places(self) -> re.Pattern[str] | None:
        """Where a text may be cut: no token crosses it, and a text's start is not treated specially."""
        parts = json.loads(self.tokenizer_json)
        before = json.dumps(parts.get("pre_tokenizer"))
        if not self._byte_level or parts.get("normalizer") is not None or '"add_prefix_space": true' in before:
            return None
        if '"use_regex": true' in before and parts["pre_tokenizer"]["type"] == "ByteLevel":
            return cutting.WORDS
        return cutting.LINES if '"use_regex": true' in before or '"Split"' in before else None

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        out = np.zeros(self.vocab_size, np.int32)
        model = json.loads(self.tokenizer_json)["model"]
        added = self._live.get_added_tokens_decoder()
        for token, i in self._live.get_vocab(with_added_tokens=True).items():
            if self._byte_level and i not in added:
                out[i] = len(token)
            elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):  # a byte, in SentencePiece's spelling
                out[i] = 1
            else:
                out[i] = len(_spelled_out(token, model).encode())
        out[self.end_of_text] = 0
        return out

    def pieces(self, text: str) -> Iterator[str]:
        return cutting.cut(text, self._places) if self._places else iter([text])

    def encode(self, text: str) -> np.ndarray:
        groups = cutting.grouped(self.pieces(text), len, _GROUP)
        return np.concatenate([np.empty(0, self.dtype), *(ids for group in groups for ids in self.encode_batch(group))])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            with _surrogates(text):
                text.encode()
        with panics("the tokenizer can't encode this text"):
            encodings = self._live.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        with panics("the tokenizer can't decode these ids"):
            return self._live.decode(self._text_ids(ids).tolist(), skip_special_tokens=False)

    @cached_property
    def _letter(self) -> list[int]:
        """Ids of some text to stand before another; none where they can't be had."""
        with contextlib.suppress(DataError):
            return self.encode("a").tolist()
        return []

    def decode_on(self, ids: Sequence[int] | np.ndarray) -> str:
        if self._byte_level:
            return self.decode(ids)
        start, whole = self.decode(self._letter), self.decode([*self._letter, *ids])
        return whole.removeprefix(start) if whole.startswith(start) else self.decode(ids)

    def to_json(self) -> str:
        settings = json.loads(self.settings)
        return json.dumps(self._ids_json() | ({"settings": settings} if settings else {}))

    def _ids_json(self) -> dict[str, Any]:
        return {"kind": "hf", "end_of_text": self.end_token, "tokenizer": json.loads(self.tokenizer_json)}

    @cached_property
    def fingerprint(self) -> str:
        """Settings change no id."""
        return hashlib.sha256(json.dumps(self._ids_json()).encode()).hexdigest()


def _spelled_out(token: str, model: dict[str, Any]) -> str:
    """The text of a token that is not spelled in bytes, with the space that its spelling tells of.

    Args:
      model: that section of the tokenizer.json.
    """
    inner, last = (model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    if inner:  # as WordPiece's "##", without which a word begins
        return token.removeprefix(inner) if token.startswith(inner) else f" {token}"
    if last and token.endswith(last):
        return token.removesuffix(last) + " "
    return token.replace("\u2581", " ")


def from_json(text: str) -> Tokenizer:
    """The tokenizer that `to_json` wrote.

    Raises:
      DataError: the text is something else.
    """
    try:
        match json.loads(text):
            case {"kind": "bytes"}:
                return Bytes()
            case {"kind": "chars", "characters": str(characters)}:
                code_points(characters)  # fails now, not at the first use
                return Chars(characters)
            case {"kind": "hf", "end_of_text": str(end_token), "tokenizer": dict(parts), **others}:
                tokenizer = HuggingFace(json.dumps(parts), end_token, json.dumps(others.get("settings") or {}))
                trial(tokenizer.tokenizer_json, "not a tokenizer")
                with panics("not a tokenizer"):
                    _ = tokenizer.end_of_text
                return tokenizer
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a tokenizer of jaxlm: {error}") from error
    raise DataError("not a tokenizer of jaxlm: no kind 'bytes', 'chars' or 'hf'")


@contextlib.contextmanager
def _surrogates(text: str) -> Iterator[None]:
    try:
        yield
    except UnicodeEncodeError as error:
        raise DataError(f"the text has a lone surrogate, {text[error.start]!r}, at character {error.start}") from error


def code_points(text: str) -> np.ndarray:
    """uint32[characters]."""
    with _surrogates(text):
        return np.frombuffer(text.encode("utf-32-le"), "<u4")
