"""Text to ids and back: what all kinds of tokenizer have in common, and each kind's own."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import tokenizers as library
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data import cutting, tokenizers
from jaxlm.data.tokenizer_specs import build
from jaxlm.data.tokenizers import END_OF_TEXT, Bytes, Chars, HuggingFace, Tokenizer
from jaxlm.errors import DataError

CORPUS = ["the cat sat on the mat\n", "the dog sat on the log\n\n  indented\n" * 20, "naïve café 🙂 \u4e2d\u6587"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return build("bpe:300", CORPUS)


# What all kinds have in common


@pytest.mark.parametrize("spec", ["bytes", "chars", "bpe:300"])
def test_round_trips(spec: str) -> None:
    tokenizer = build(spec, CORPUS)
    for text in [*CORPUS, "", "a" * 50, "\r\n\t é" if spec != "chars" else " \n"]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint16 and tokenizer.decode(ids) == text
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    batch = tokenizer.encode_batch([*CORPUS, ""])
    for text, ids in zip([*CORPUS, ""], batch, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))

    again = tokenizers.from_json(tokenizer.to_json())
    assert again == tokenizer and again.fingerprint == tokenizer.fingerprint and again.to_json() == tokenizer.to_json()
    assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer
    assert again.vocab_size == tokenizer.vocab_size and again.end_of_text == tokenizer.end_of_text
    np.testing.assert_array_equal(again.encode(CORPUS[2]), tokenizer.encode(CORPUS[2]))


@pytest.mark.parametrize("spec", ["bytes", "chars", "bpe:300"])
def test_end_of_text_is_no_text(spec: str) -> None:
    tokenizer = build(spec, [*CORPUS, END_OF_TEXT])
    end = tokenizer.end_of_text
    assert 0 <= end < tokenizer.vocab_size and tokenizer.byte_lengths[end] == 0
    assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,)
    ids = tokenizer.encode("the cat")
    assert tokenizer.decode([*ids, end, *ids, end]) == "the catthe cat"
    spelled = tokenizer.encode(f"the{END_OF_TEXT}cat")
    assert end not in spelled and tokenizer.decode(spelled) == f"the{END_OF_TEXT}cat"


@pytest.mark.parametrize("spec", ["bytes", "chars", "bpe:300"])
def test_bad_text_and_ids(spec: str) -> None:
    tokenizer = build(spec, CORPUS)
    with pytest.raises(DataError, match="lone surrogate, '.ud800', at character 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(DataError, match="lone surrogate"):
        tokenizer.encode_batch(["a", "\ud800"])
    for bad in (-1, tokenizer.vocab_size, 10**9):
        with pytest.raises(DataError, match=f"token id {bad} is outside of the vocabulary of {tokenizer.vocab_size}"):
            tokenizer.decode([0, bad])


@given(TEXT)
def test_bytes_round_trip(text: str) -> None:
    tokenizer = Bytes()
    ids = tokenizer.encode(text)
    assert bytes(ids.astype(np.uint8)) == text.encode() and tokenizer.decode(ids) == text


@given(st.lists(TEXT.filter(bool), min_size=1))
def test_chars_round_trip(corpus: list[str]) -> None:
    tokenizer = build("chars", corpus)
    text = "".join(corpus)
    assert tokenizer.vocab_size == len(set(text)) + 1
    ids = tokenizer.encode(text)
    assert [sorted(set(text))[i] for i in ids] == list(text) and tokenizer.decode(ids) == text
    assert tokenizers.from_json(tokenizer.to_json()) == tokenizer


@settings(max_examples=200)
@given(text=TEXT)
def test_bpe_round_trip(bpe: Tokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text and bpe.byte_lengths[ids].sum() == len(text.encode())


@settings(max_examples=50)
@given(ids=st.lists(st.integers(0, 256)))
def test_decode_never_fails_on_bytes_that_are_not_utf8(bpe: Tokenizer, ids: list[int]) -> None:
    assert isinstance(Bytes().decode(ids), str) and isinstance(bpe.decode(ids), str)


def test_decode_replaces_what_is_not_utf8(bpe: Tokenizer) -> None:
    assert Bytes().decode([0x61, 0xFF, 0x62]) == "a\ufffdb"
    assert bpe.decode(bpe.encode("ß")[:1]) == "\ufffd"


# Each kind


def test_bytes() -> None:
    tokenizer = Bytes()
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)
    assert tokenizer.encode("é\n").tolist() == [0xC3, 0xA9, 10]


def test_chars_are_known_or_not() -> None:
    tokenizer = Chars("abc🙂")
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (5, 4)
    assert tokenizer.encode("abc🙂").tolist() == [0, 1, 2, 3]
    with pytest.raises(DataError, match="character 'x' at position 2 is not among the 4 known ones"):
        tokenizer.encode("abxy")


def test_many_ids_need_four_bytes() -> None:
    small, large = ("".join(chr(0x10000 + i) for i in range(n)) for n in (2**16 - 1, 2**16))
    assert Chars(small).encode(small).dtype == np.uint16
    ids = Chars(large).encode(large)
    assert ids.dtype == np.uint32 and ids.max() == 2**16 - 1


@pytest.fixture(scope="module")
def spaced() -> Tokenizer:
    """Its tokens include runs of white space, so that a cut among them would show."""
    return build("bpe:340", ["ab\n\n  1.\n\n\n\ta\r\n\r\n b'b\n \n}\n  \n\n"] * 20)


@settings(max_examples=500)
@given(text=st.text("ab1. '\n\t\r}é\u2028\u00a0"), length=st.integers(1, 8))
def test_long_texts_are_cut_where_it_changes_nothing(spaced: Tokenizer, text: str, length: int) -> None:
    whole = spaced.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "_PIECE", length)
        patch.setattr(tokenizers, "_GROUP", 10)
        pieces = list(spaced.pieces(text))
        np.testing.assert_array_equal(spaced.encode(text), whole)
    assert "".join(pieces) == text


def test_long_texts_are_cut(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "_PIECE", 4)
    assert list(bpe.pieces("abcdef\ngh\n\nijklm\nn")) == ["abcdef\n", "gh\n\nijklm\n", "n"]
    assert list(bpe.pieces("abcdef gh  ij kl")) == ["abcdef", " gh  ij", " kl"]
    assert list(Bytes().pieces("abcdef")) == ["abcd", "ef"]
    parts = json.loads(bpe.to_json())["tokenizer"]
    parts["pre_tokenizer"]["add_prefix_space"] = True
    assert list(HuggingFace(json.dumps(parts), END_OF_TEXT).pieces("abcdef\ngh")) == ["abcdef\ngh"]
    split = {"type": "Split", "pattern": {"Regex": "\\n"}, "behavior": "Isolated", "invert": False}
    parts["pre_tokenizer"] = split  # words are not apart
    assert list(HuggingFace(json.dumps(parts), END_OF_TEXT).pieces("abcde fg\nhi")) == ["abcde fg\n", "hi"]


def test_a_text_without_a_place_to_cut_is_cut_all_the_same(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would take a hundred times its size in memory."""
    monkeypatch.setattr(cutting, "_PIECE", 4)
    monkeypatch.setattr(cutting, "_LONGEST", 6)
    assert list(bpe.pieces("thecatsatonit")) == ["thecat", "satoni", "t"]
    assert list(bpe.pieces("thecat")) == ["thecat"]
    assert bpe.decode(bpe.encode("é" * 20)) == "é" * 20


def test_sentencepiece_byte_lengths() -> None:
    vocab = {END_OF_TEXT: 0, "<0x0A>": 1, "\u2581a": 2, "é": 3}
    live = library.Tokenizer(library.models.BPE(vocab, [], byte_fallback=True))
    live.decoder = library.decoders.Sequence([library.decoders.ByteFallback(), library.decoders.Metaspace()])
    assert HuggingFace(live.to_str(), END_OF_TEXT).byte_lengths.tolist() == [0, 1, 2, 2]


def test_byte_lengths_are_of_text_not_of_how_tokens_are_spelled() -> None:
    vocab = {token: i for i, token in enumerate([END_OF_TEXT, "[UNK]", "a", "play", "##ing"])}
    live = library.Tokenizer(library.models.WordPiece(vocab, unk_token="[UNK]"))
    live.decoder = library.decoders.WordPiece()
    tokenizer = HuggingFace(live.to_str(), END_OF_TEXT)
    assert tokenizer.byte_lengths[[0, 2, 3, 4]].tolist() == [0, len(" a"), len(" play"), len("ing")]
    ends = library.Tokenizer(library.models.BPE({END_OF_TEXT: 0, "a": 1, "a</w>": 2}, [], end_of_word_suffix="</w>"))
    ends.decoder = library.decoders.BPEDecoder()
    assert HuggingFace(ends.to_str(), END_OF_TEXT).byte_lengths.tolist() == [0, len("a"), len("a ")]


def test_the_token_for_unknown_text() -> None:
    vocab = {END_OF_TEXT: 0, "[UNK]": 1, "a": 2}
    piece = library.Tokenizer(library.models.WordPiece(vocab, unk_token="[UNK]"))
    gram = library.Tokenizer(library.models.Unigram([(END_OF_TEXT, 0.0), ("a", -1.0), ("?", -2.0)], 2))
    assert [HuggingFace(live.to_str(), END_OF_TEXT).unknown for live in (piece, gram)] == [1, 2]
    assert HuggingFace(piece.to_str(), "[UNK]").unknown is None  # there it ends texts
    assert Bytes().unknown is None and Chars("a").unknown is None and build("bpe:300", CORPUS).unknown is None


def without_space(kind: str) -> HuggingFace:
    """A tokenizer whose decoder has a text begin without a space."""
    if kind == "wordpiece":
        live = library.Tokenizer(library.models.WordPiece({END_OF_TEXT: 0, "a": 1, "cat": 2, "##s": 3, "sat": 4}))
        live.pre_tokenizer, live.decoder = library.pre_tokenizers.Whitespace(), library.decoders.WordPiece()
        return HuggingFace(live.to_str(), END_OF_TEXT)
    vocab = [(END_OF_TEXT, 0.0), *[(piece, -1.0) for piece in ("\u2581", "a", "\u2581cat", "s", "\u2581sat", "<0xC3>")]]
    live = library.Tokenizer(library.models.Unigram([*vocab, ("<0xA9>", -1.0)], 0, byte_fallback=True))
    live.pre_tokenizer = library.pre_tokenizers.Metaspace()
    live.decoder = library.decoders.Sequence([library.decoders.ByteFallback(), library.decoders.Metaspace()])
    return HuggingFace(live.to_str(), END_OF_TEXT)


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_text_that_goes_on_keeps_its_first_space(kind: str) -> None:
    tokenizer = without_space(kind)
    ids = tokenizer.encode("cats sat")
    text = tokenizer.decode(ids)
    assert text == "cats sat" and tokenizer.decode(ids[-1:]) == "sat"
    for cut in range(1, len(ids)):
        assert tokenizer.decode(ids[:cut]) + tokenizer.decode_on(ids[cut:]) == text
    assert tokenizer.decode_on([]) == ""


def test_bytes_that_go_on_are_whole() -> None:
    tokenizer = without_space("unigram")
    ids = tokenizer.encode("cat é")
    assert tokenizer.decode(ids) == "cat é" and tokenizer.decode_on(ids[-2:]) == "é"


def test_other_texts_go_on_as_they_begin(bpe: Tokenizer) -> None:
    digits = library.Tokenizer(library.models.WordLevel({END_OF_TEXT: 0, "1": 1}, unk_token="none"))  # and no letter
    digits.decoder = library.decoders.Fuse()
    for tokenizer in (Bytes(), Chars(" 1"), bpe, HuggingFace(digits.to_str(), END_OF_TEXT)):
        ids = tokenizer.encode("1")
        assert tokenizer.decode_on(ids) == tokenizer.decode(ids) == "1"
    assert bpe.decode_on(bpe.encode(" é")[:-1]) == bpe.decode(bpe.encode(" é")[:-1])


# JSON


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, "[]", '{"kind": "words"}', '{"kind": "chars"}', '{"kind": "hf", "tokenizer": {}}']
)
def test_damaged_json(text: str) -> None:
    with pytest.raises(DataError, match="not a tokenizer of jaxlm"):
        tokenizers.from_json(text)


@pytest.mark.parametrize("end", ["none", "\\ud800"])
def test_json_with_a_damaged_tokenizer(bpe: Tokenizer, end: str) -> None:
    with pytest.raises(DataError, match="not a tokenizer"):
        tokenizers.from_json('{"kind": "hf", "end_of_text": "x", "tokenizer": {}}')
    parts = json.loads(bpe.to_json())["tokenizer"]
    with pytest.raises(DataError, match="not a tokenizer of jaxlm|has no token 'none' to end a text with"):
        tokenizers.from_json(f'{{"kind": "hf", "end_of_text": "{end}", "tokenizer": {json.dumps(parts)}}}')
    with pytest.raises(DataError, match="lone surrogate"):
        tokenizers.from_json('{"kind": "chars", "characters": "a\\ud800"}')
