"""A tokenizer as the files that `transformers.AutoTokenizer.from_pretrained` reads, with the ids that it has here.

One difference stays: where text of data spells out a special token, jaxlm encodes these characters as any others, and
transformers takes them for the token (unless called with split_special_tokens=True).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from jaxlm.data.tokenizers import END_OF_TEXT, Bytes, Chars, HuggingFace, Tokenizer

if TYPE_CHECKING:
    import tokenizers


def files(tokenizer: Tokenizer, context_length: int) -> dict[str, str]:
    """{file name: text} of tokenizer.json and tokenizer_config.json.

    The ids of a text are the same, and so is what ids decode to, but that transformers spells end-of-text tokens out.
    jaxlm reads the folder back with the same ids too. A character that `chars` doesn't know is an error there as here.

    Args:
      context_length: that transformers warns beyond.
    """
    match tokenizer:
        case HuggingFace():
            text, end = tokenizer.tokenizer_json, tokenizer.end_token
        case Bytes():
            text, end = _bytes().to_str(), END_OF_TEXT
        case Chars():
            text, end = _chars(tokenizer.characters).to_str(), END_OF_TEXT
        case _:
            raise TypeError(f"a tokenizer of another kind: {type(tokenizer).__name__}")
    parts = json.loads(text)
    if (parts.get("post_processor") or {}).get("type") != "ByteLevel":  # which changes offsets only
        parts["post_processor"] = None  # others add special tokens, which transformers asks for and jaxlm doesn't
    settings = {
        # The plain one: GPT2Tokenizer would put its own pre-tokenizer in the place of the one in tokenizer.json.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,  # what a text follows in training
        "eos_token": end,
        "unk_token": end,
        "add_prefix_space": (parts["pre_tokenizer"] or {}).get("add_prefix_space", False),
        "clean_up_tokenization_spaces": False,  # it would drop spaces before punctuation
        "model_max_length": context_length,
    } | _settings(tokenizer)
    # spelled as json.dumps does, so that an export of the export is the same file
    return {"tokenizer.json": json.dumps(parts), "tokenizer_config.json": json.dumps(settings, indent=2) + "\n"}


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """{"eos_token_id": 2, ...}: of the tokens that a model's config.json and generation_config.json name, too."""
    end, named = tokenizer.end_of_text, {}
    if isinstance(tokenizer, HuggingFace):
        known = {key: tokenizer.id_of(token) for key, token in _settings(tokenizer).items() if key in _NAMED}
        named = {f"{key}_id": i for key, i in known.items() if i is not None}
    return {"bos_token_id": end, "eos_token_id": end, **named}


def begins(tokenizer: Tokenizer) -> str:
    """The token that its source begins a text with, where that is not the end of text, which it follows here; or ""."""
    begin: str = _settings(tokenizer).get("bos_token", "")
    return begin if isinstance(tokenizer, HuggingFace) and begin != tokenizer.end_token else ""


_NAMED = ("bos_token", "pad_token")


def _settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """What the tokenizer that this one is from calls its tokens, and its chat template."""
    found: dict[str, Any] = json.loads(tokenizer.settings) if isinstance(tokenizer, HuggingFace) else {}
    return found


def _bytes() -> tokenizers.Tokenizer:
    """Byte-level BPE that merges nothing: each byte is a token, spelled as GPT-2 spells it."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    others = iter(sorted(c for c in alphabet if ord(c) > 255))  # stand for the bytes that are not printable
    spelled = [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)]
    live = tokenizers.Tokenizer(models.BPE({c: byte for byte, c in enumerate(spelled)}, []))
    live.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    live.decoder = decoders.ByteLevel()
    live.add_special_tokens([END_OF_TEXT])
    return live


def _chars(characters: str) -> tokenizers.Tokenizer:
    """Each character is a word. The unknown word is none of the vocabulary, which makes a character of its own an error
    where others would be dropped or end the text."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    live = tokenizers.Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    live.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    live.decoder = decoders.Fuse()
    live.add_special_tokens([END_OF_TEXT])
    return live
