"""What `data.tokenizer` names: a spec such as `bytes`, `bpe:4096`, a file, a folder or a hub id becomes a tokenizer."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlm import hub
from jaxlm.data import cutting, paths, readers
from jaxlm.data.tokenizer_trial import load, panics, trial
from jaxlm.data.tokenizers import (
    CODE_POINTS,
    END_OF_TEXT,
    Bytes,
    Chars,
    HuggingFace,
    Tokenizer,
    code_points,
    from_json,
)
from jaxlm.errors import ConfigError, DataError
from jaxlm.files import expanded

if TYPE_CHECKING:
    import tokenizers

BPE_SMALLEST = 257  # every byte, and the end of text

_BESIDE = ("tokenizer_config.json", "special_tokens_map.json")  # these name the eos token of a tokenizer.json
_TOKENIZERS = re.compile("tokenizer|vocab|merges|spiece|sentencepiece|special_tokens", re.IGNORECASE)
"""What the names of a tokenizer's files begin with, in all layouts."""
_TEMPLATE = "chat_template.jinja"
_ROLES = tuple(f"{name}_token" for name in ("bos", "pad", "unk", "sep", "cls", "mask"))
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".ckpt")


def build(spec: str, corpus: Iterable[str] = ()) -> Tokenizer:
    """The tokenizer that `spec` names.

    Args:
      spec: `bytes`; `chars`, those of the corpus; `bpe:SIZE`, trained on the corpus; a tokenizer.json, the
        library's or a run's; a run directory; a Hugging Face directory; or a hub id such as `gpt2`, from the local
        cache if it is there.
      corpus: texts; read by `chars` and `bpe` only.

    Raises:
      ConfigError: no such kind of tokenizer, or an impossible size.
      DataError: it is missing, unreadable or damaged.
    """
    if spec == "bytes":
        return Bytes()
    if spec == "chars":
        return _chars(corpus)
    if spec == "bpe" or spec.startswith("bpe:"):
        return _bpe(_bpe_size(spec), corpus)
    path = expanded(spec)
    if path.is_dir():
        whole = path / "tokenizer.json"
        return _from_file(whole) if whole.is_file() else _from_transformers(str(path))
    if path.is_file():
        return _from_file(path)
    if spec.startswith(("/", ".", "~")) or path.suffix == ".json" or spec.count("/") > 1:
        raise paths.missing(path)
    close = difflib.get_close_matches(re.split(r"[^a-z]", spec.lower())[0], ("bytes", "chars", "bpe"), n=1, cutoff=0.75)
    if (close and "/" not in spec) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec):
        hint = f"did you mean {close[0]!r}? Expected" if close else "expected"
        raise ConfigError(
            f"unknown data.tokenizer {spec!r}; {hint} bytes, chars, bpe:SIZE, a tokenizer.json, "
            "a run directory, a Hugging Face directory or a hub id"
        )
    return _from_transformers(spec)


def key(spec: str) -> str:
    """What `build` depends on besides the corpus: the spec, and the content of the files that it names."""
    path = expanded(spec)
    if not path.exists():
        return spec
    if path.is_file():
        found = [path, *(path.parent / name for name in (*_BESIDE, _TEMPLATE))]
    elif (path / "tokenizer.json").is_file():
        found = [path / name for name in ("tokenizer.json", *_BESIDE, _TEMPLATE)]
    else:  # transformers knows which it reads: vocab.txt, spiece.model, ...
        found = [file for file in sorted(path.iterdir()) if file.suffix not in _WEIGHTS]
    digest = hashlib.sha256()
    for file in filter(Path.is_file, found):
        digest.update(json.dumps([file.name, hashlib.sha256(_read(file)).hexdigest()]).encode())
    return f"{spec} {digest.hexdigest()}"


def _chars(corpus: Iterable[str]) -> Chars:
    seen = np.zeros(CODE_POINTS, bool)
    for text in corpus:
        seen[code_points(text)] = True
    if not seen.any():
        raise DataError("data.tokenizer='chars' found no characters in the corpus")
    return Chars(np.flatnonzero(seen).astype("<u4").tobytes().decode("utf-32-le"))


def _bpe_size(spec: str) -> int:
    number = spec.removeprefix("bpe").removeprefix(":")
    size = int(number) if re.fullmatch(r"[0-9]{1,9}", number) else 0
    if size < BPE_SMALLEST:
        raise ConfigError(
            f"data.tokenizer is {spec!r}; expected bpe:SIZE with SIZE from {BPE_SMALLEST}, such as bpe:4096"
        )
    return size


def _bpe(size: int, corpus: Iterable[str]) -> HuggingFace:
    """Byte-level BPE as GPT-2's: any text can be encoded, and comes back the same."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    try:
        with panics(f"can't train bpe:{size} on this text"):
            tokenizer.train_from_iterator(
                (piece for text in corpus for piece in cutting.cut(text, cutting.WORDS)), trainer
            )
    except UnicodeEncodeError as error:
        raise DataError(f"the text has a lone surrogate at character {error.start}") from error
    actual = tokenizer.get_vocab_size()
    if actual < size:
        print(f"warning: bpe:{size} stopped at {actual} tokens: the corpus has no more pairs to merge", file=sys.stderr)
    return HuggingFace(_json(tokenizer), END_OF_TEXT)


def _from_file(path: Path) -> Tokenizer:
    """A tokenizer.json: of the tokenizers library, or one that `Tokenizer.to_json` wrote, which has a "kind"."""
    try:
        text = _read(path).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a tokenizer.json: not UTF-8") from error
    try:
        with contextlib.suppress(ValueError, RecursionError):  # the library says what is wrong with it
            match json.loads(text):
                case {"kind": _}:
                    return from_json(text)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return _with_end(text, _end_token(path.parent), str(path), _settings(path.parent))


def _end_token(folder: Path) -> str | None:
    """The eos token that the files next to a tokenizer.json name."""
    for name in _BESIDE:
        if (folder / name).is_file():
            try:
                match json.loads(_read(folder / name)):
                    case {"eos_token": str(token)} | {"eos_token": {"content": str(token)}}:
                        return token
                    case dict():
                        pass
                    case other:
                        raise DataError(f"{folder / name} holds a JSON {type(other).__name__}; expected an object")
            except (ValueError, RecursionError) as error:
                raise DataError(f"{folder / name} is not JSON: {error}") from error
    return None


def _settings(folder: Path) -> dict[str, Any]:
    """What the files next to a tokenizer.json call its tokens, and their chat template."""
    raw: dict[str, Any] = {}
    for name in reversed(_BESIDE):  # the first says it last
        with contextlib.suppress(ValueError, RecursionError, OSError):  # `_end_token` has told what is wrong with it
            match json.loads((folder / name).read_bytes()):
                case dict(found):
                    raw |= found
    with contextlib.suppress(ValueError, OSError):
        raw["chat_template"] = (folder / _TEMPLATE).read_text("utf-8")
    return raw


def _from_transformers(spec: str) -> HuggingFace:
    """A hub id, or a directory in an older layout, through transformers. Never runs code that comes with it."""

    def from_pretrained(local: bool) -> Any:
        from transformers import AutoTokenizer

        with panics(f"can't load the tokenizer {spec!r}"):
            return AutoTokenizer.from_pretrained(spec, use_fast=True, trust_remote_code=False, local_files_only=local)

    _try_of_hub(spec, local=True)
    try:
        loaded = from_pretrained(local=True)
    except DataError as error:
        if os.path.isdir(spec):
            if not any(map(_TOKENIZERS.match, os.listdir(spec))):
                raise DataError(f"{spec} holds no tokenizer: neither a tokenizer.json nor an older layout") from error
            raise
        if reason := hub.unreachable():
            raise DataError(
                f"tokenizer {spec!r} is not in the local Hugging Face cache, and {reason}. Give data.tokenizer "
                "a folder or tokenizer.json on this machine, or set HF_HOME to a cache that has it"
            ) from error
        _try_of_hub(spec, local=False)
        loaded = from_pretrained(local=False)
    live = getattr(loaded, "backend_tokenizer", None)
    if live is None:
        raise DataError(f"tokenizer {spec!r} has no fast (tokenizers library) form; jaxlm needs one")
    settings = {**loaded.special_tokens_map, "chat_template": loaded.chat_template}
    return _with_end(_json(live), loaded.eos_token, spec, settings)


def _try_of_hub(spec: str, local: bool) -> None:
    """The trial of the tokenizer.json that transformers will load."""
    from huggingface_hub import hf_hub_download

    text = ""
    with contextlib.suppress(Exception):  # a folder or a repository in an older layout, or no repository
        text = Path(hf_hub_download(spec, "tokenizer.json", local_files_only=local)).read_text("utf-8")
    if text:
        trial(text, f"can't load the tokenizer {spec!r}")


def _with_end(text: str, end_token: str | None, name: str, settings: dict[str, Any]) -> HuggingFace:
    what = f"{name} is not a tokenizer.json"
    trial(text, what)
    with panics(what):
        live = load(text)
    vocabulary = live.get_vocab(with_added_tokens=True)
    known = [token for token in (end_token or END_OF_TEXT, END_OF_TEXT) if token in vocabulary]
    if not known:
        raise DataError(
            f"tokenizer {name} has no token to end a text with: neither an eos token nor {END_OF_TEXT}. "
            'Name one as "eos_token" in the tokenizer_config.json next to it'
        )
    kept: dict[str, Any] = {}
    for key in _ROLES:
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in vocabulary:
            kept[key] = token
    if template := settings.get("chat_template"):
        kept["chat_template"] = template
    return HuggingFace(_with_special(_json(live), known[0]), known[0], json.dumps(kept))


def _with_special(text: str, token: str) -> str:
    """A tokenizer.json in which a token, if it is an added one, is special: no text that spells it out becomes it."""
    parts = json.loads(text)
    for added in parts["added_tokens"]:
        if added["content"] == token:
            added["special"] = True
    return json.dumps(parts)


def _json(live: tokenizers.Tokenizer) -> str:
    """Its tokenizer.json, in the one spelling that `json.dumps` gives: equal tokenizers are equal texts."""
    return json.dumps(json.loads(live.to_str()))


def _read(path: Path) -> bytes:
    with readers.reading(path):
        return path.read_bytes()
