from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers as library
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data import hub, tokenizers
from jaxlm.data.tokenizers import END_OF_TEXT, Tokenizer
from jaxlm.errors import ConfigError, DataError

CORPUS = ["the cat sat on the mat\n", "the dog sat on the log\n\n  indented\n" * 20, "naïve café 🙂 \u4e2d\u6587"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return tokenizers.build("bpe:300", CORPUS)


def save(folder: Path, tokenizer: Tokenizer, **changes: object) -> Path:
    """The tokenizer.json of `tokenizer`, with changed parts."""
    folder.mkdir(exist_ok=True)
    parts = json.loads(tokenizer.to_json())["tokenizer"]
    (folder / "tokenizer.json").write_text(json.dumps({**parts, **changes}))
    return folder / "tokenizer.json"


# What all kinds have in common


@pytest.mark.parametrize("spec", ["bytes", "chars", "bpe:300"])
def test_round_trips(spec: str) -> None:
    tokenizer = tokenizers.build(spec, CORPUS)
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
    tokenizer = tokenizers.build(spec, [*CORPUS, END_OF_TEXT])
    end = tokenizer.end_of_text
    assert 0 <= end < tokenizer.vocab_size and tokenizer.byte_lengths[end] == 0
    assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,)
    ids = tokenizer.encode("the cat")
    assert tokenizer.decode([*ids, end, *ids, end]) == "the catthe cat"
    spelled = tokenizer.encode(f"the{END_OF_TEXT}cat")
    assert end not in spelled and tokenizer.decode(spelled) == f"the{END_OF_TEXT}cat"


@pytest.mark.parametrize("spec", ["bytes", "chars", "bpe:300"])
def test_bad_text_and_ids(spec: str) -> None:
    tokenizer = tokenizers.build(spec, CORPUS)
    with pytest.raises(DataError, match="lone surrogate, '.ud800', at character 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(DataError, match="lone surrogate"):
        tokenizer.encode_batch(["a", "\ud800"])
    for bad in (-1, tokenizer.vocab_size, 10**9):
        with pytest.raises(DataError, match=f"token id {bad} is outside of the vocabulary of {tokenizer.vocab_size}"):
            tokenizer.decode([0, bad])
    with pytest.raises(DataError, match="lone surrogate"):
        tokenizers.build("bpe:300", ["\ud800"])


@given(TEXT)
def test_bytes_round_trip(text: str) -> None:
    tokenizer = tokenizers.build("bytes")
    ids = tokenizer.encode(text)
    assert bytes(ids.astype(np.uint8)) == text.encode() and tokenizer.decode(ids) == text


@given(st.lists(TEXT.filter(bool), min_size=1))
def test_chars_round_trip(corpus: list[str]) -> None:
    tokenizer = tokenizers.build("chars", corpus)
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
    assert isinstance(tokenizers.build("bytes").decode(ids), str) and isinstance(bpe.decode(ids), str)


def test_decode_replaces_what_is_not_utf8(bpe: Tokenizer) -> None:
    assert tokenizers.build("bytes").decode([0x61, 0xFF, 0x62]) == "a\ufffdb"
    assert bpe.decode(bpe.encode("ß")[:1]) == "\ufffd"


# Each kind


def test_bytes() -> None:
    tokenizer = tokenizers.build("bytes")
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)
    assert tokenizer.encode("é\n").tolist() == [0xC3, 0xA9, 10]


def test_chars_are_sorted_and_known() -> None:
    tokenizer = tokenizers.build("chars", ["cab", "b🙂"])
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (5, 4)
    assert tokenizer.encode("abc🙂").tolist() == [0, 1, 2, 3]
    with pytest.raises(DataError, match="character 'x' at position 2 is not among the 4 known ones"):
        tokenizer.encode("abxy")
    with pytest.raises(DataError, match="no characters"):
        tokenizers.build("chars", [""])


def test_many_ids_need_four_bytes() -> None:
    small, large = ("".join(chr(0x10000 + i) for i in range(n)) for n in (2**16 - 1, 2**16))
    assert tokenizers.build("chars", [small]).encode(small).dtype == np.uint16
    ids = tokenizers.build("chars", [large]).encode(large)
    assert ids.dtype == np.uint32 and ids.max() == 2**16 - 1


def test_bpe_is_trained_to_its_size_and_says_when_it_cannot(bpe: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    assert bpe.vocab_size == 300 and len(bpe.encode(CORPUS[0])) < len(CORPUS[0])
    assert tokenizers.build("bpe:257", CORPUS).vocab_size == 257
    assert capsys.readouterr().err == ""
    assert tokenizers.build("bpe:5000", ["abc abc"]).vocab_size < 300
    assert "bpe:5000 stopped at" in capsys.readouterr().err


def test_bpe_is_the_same_in_another_process(bpe: Tokenizer) -> None:
    code = f"from jaxlm.data import tokenizers; print(tokenizers.build('bpe:300', {CORPUS!r}).fingerprint)"
    env = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == bpe.fingerprint


@pytest.fixture(scope="module")
def spaced() -> Tokenizer:
    """Its tokens include runs of white space, so that a cut among them would show."""
    return tokenizers.build("bpe:340", ["ab\n\n  1.\n\n\n\ta\r\n\r\n b'b\n \n}\n  \n\n"] * 20)


@settings(max_examples=500, deadline=None)
@given(text=st.text("ab1. '\n\t\r}é\u2028\u00a0"), length=st.integers(1, 8))
def test_long_texts_are_cut_where_it_changes_nothing(spaced: Tokenizer, text: str, length: int) -> None:
    whole = spaced.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "_PIECE", length)
        patch.setattr(tokenizers, "_GROUP", 10)
        pieces = list(spaced.pieces(text))
        np.testing.assert_array_equal(spaced.encode(text), whole)
    assert "".join(pieces) == text


def test_long_texts_are_cut(bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "_PIECE", 4)
    assert list(bpe.pieces("abcdef\ngh\n\nijklm\nn")) == ["abcdef\n", "gh\n\nijklm\n", "n"]
    assert list(tokenizers.build("bytes").pieces("abcdef")) == ["abcd", "ef"]
    prefixed = save(
        tmp_path,
        bpe,
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "use_regex": True, "trim_offsets": True},
    )
    assert list(tokenizers.build(str(prefixed)).pieces("abcdef\ngh")) == ["abcdef\ngh"]


# Hugging Face files


def test_file_and_folder(bpe: Tokenizer, tmp_path: Path) -> None:
    path = save(tmp_path / "tok", bpe)
    for spec in (path, path.parent):
        tokenizer = tokenizers.build(str(spec))
        assert tokenizer.fingerprint == bpe.fingerprint


def test_folder_in_the_older_layout(bpe: Tokenizer, tmp_path: Path) -> None:
    model = json.loads(bpe.to_json())["tokenizer"]["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in model["merges"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    tokenizer = tokenizers.build(str(tmp_path))
    assert tokenizer.end_of_text == bpe.end_of_text
    np.testing.assert_array_equal(tokenizer.encode(CORPUS[1]), bpe.encode(CORPUS[1]))


@pytest.mark.parametrize("eos", ["</s>", {"content": "</s>", "lstrip": False}])
def test_end_of_text_is_the_eos_token(bpe: Tokenizer, tmp_path: Path, eos: object) -> None:
    token = {"id": 300, "content": "</s>", "special": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    path = save(tmp_path, bpe, added_tokens=[{**token, **flags}])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    tokenizer = tokenizers.build(str(path))
    assert tokenizer.end_of_text == 300 and tokenizer.vocab_size == 301
    assert 300 not in tokenizer.encode("a</s>b")

    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="tokenizer_config.json is not JSON"):
        tokenizers.build(str(path))


def test_no_end_of_text(tmp_path: Path) -> None:
    library.Tokenizer(library.models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"neither an eos token nor <\|endoftext\|>"):
        tokenizers.build(str(tmp_path))


def test_file_cannot_pad_truncate_drop_out_or_add_tokens(bpe: Tokenizer, tmp_path: Path) -> None:
    live = library.Tokenizer.from_str(json.dumps(json.loads(bpe.to_json())["tokenizer"]))
    live.enable_truncation(3)
    live.enable_padding(length=50)
    live.post_processor = library.processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, bpe.end_of_text)]
    )
    live.model.dropout = 0.9
    live.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizers.build(str(tmp_path))
    for each in (tokenizer, tokenizers.from_json(tokenizer.to_json())):
        np.testing.assert_array_equal(each.encode(CORPUS[0]), bpe.encode(CORPUS[0]))


def test_sentencepiece_byte_lengths(tmp_path: Path) -> None:
    vocab = {END_OF_TEXT: 0, "<0x0A>": 1, "\u2581a": 2, "é": 3}
    live = library.Tokenizer(library.models.BPE(vocab, [], byte_fallback=True))
    live.decoder = library.decoders.Sequence([library.decoders.ByteFallback(), library.decoders.Metaspace()])
    live.save(str(tmp_path / "tokenizer.json"))
    assert tokenizers.build(str(tmp_path)).byte_lengths.tolist() == [0, 1, 2, 2]


# Mistakes


@pytest.mark.parametrize("spec", ["bpe", "bpe:", "bpe:x", "bpe:256", "bpe:0", "bpe:-5", "bpe:1e4", "bpe:٣٠٠"])
def test_impossible_bpe(spec: str) -> None:
    with pytest.raises(ConfigError, match="expected bpe:SIZE with SIZE from 257"):
        tokenizers.build(spec, CORPUS)


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("byte", "bytes"),
        ("Bytes", "bytes"),
        ("char", "chars"),
        ("cahrs", "chars"),
        ("bpe4096", "bpe"),
        ("bpe-4096", "bpe"),
    ],
)
def test_unknown_name(spec: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown data.tokenizer {spec!r}; did you mean {hint!r}?"):
        tokenizers.build(spec)


def test_unknown_form() -> None:
    with pytest.raises(ConfigError, match="unknown data.tokenizer 'words:100'; expected bytes, chars, bpe:SIZE"):
        tokenizers.build("words:100")


def test_missing_file(bpe: Tokenizer, tmp_path: Path) -> None:
    save(tmp_path, bpe)
    with pytest.raises(DataError, match="no such file or folder: .*tokeniser.json; did you mean .*tokenizer.json?"):
        tokenizers.build(str(tmp_path / "tokeniser.json"))
    with pytest.raises(DataError, match="no such file"):
        tokenizers.build("./nothing")


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b"\xff\xfe", b"null", b'{"version": "1.0", "model": {"type": "BPE"}}']
)
def test_damaged_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match="tokenizer.json"):
        tokenizers.build(str(tmp_path / "tokenizer.json"))


def test_panic_of_the_library_is_a_data_error(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    def panic(*args: object) -> None:
        raise PanicException("index out of bounds\nnote: run with backtrace")

    monkeypatch.setattr(library.Tokenizer, "from_str", panic)
    with pytest.raises(DataError, match="index out of bounds$"):
        tokenizers.from_json(bpe.to_json())

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(library.Tokenizer, "from_str", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tokenizers.from_json(bpe.to_json())


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"kind": "words"}', '{"kind": "chars"}', '{"kind": "hf", "tokenizer": {}}']
)
def test_damaged_json(text: str) -> None:
    with pytest.raises(DataError, match="not a tokenizer of jaxlm"):
        tokenizers.from_json(text)


def test_json_with_a_damaged_tokenizer() -> None:
    with pytest.raises(DataError, match="not a tokenizer"):
        tokenizers.from_json('{"kind": "hf", "end_of_text": "x", "tokenizer": {}}')


# The hub


def test_hub_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="'gpt2-none' is not in the local .* cache, and HF_HUB_OFFLINE is set. Give"):
        tokenizers.build("gpt2-none")
    monkeypatch.setattr(hub, "unreachable", lambda: "no connection to huggingface.co")
    with pytest.raises(DataError, match="no connection to huggingface.co. Give data.tokenizer a folder"):
        tokenizers.build("owner/name")


def test_hub_id_in_the_local_cache(bpe: Tokenizer, tmp_path: Path) -> None:
    """In a process of its own, since the library reads HF_HOME when it is imported."""
    repo = tmp_path / "hub" / "models--owner--name"
    snapshot = repo / "snapshots" / "abc"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    snapshot.mkdir(parents=True)
    save(snapshot, bpe)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (snapshot / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_TEXT}))
    code = "from jaxlm.data import tokenizers; print(tokenizers.build('owner/name').encode('the cat').tolist())"
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | {"HF_HOME": str(tmp_path)}
    out = subprocess.check_output([sys.executable, "-c", code], env=env, text=True)
    assert json.loads(out) == bpe.encode("the cat").tolist()


def test_importing_data_is_quick() -> None:
    slow = ("transformers", "tokenizers", "pyarrow", "jax")
    code = f"import sys, jaxlm.data; print([name for name in {slow} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# The key of the cache


def test_key_holds_the_content_of_local_files(bpe: Tokenizer, tmp_path: Path) -> None:
    assert tokenizers.key("bytes") == "bytes"
    path = save(tmp_path, bpe)
    for spec in (str(path), str(tmp_path)):
        before = tokenizers.key(spec)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": spec}))
        between = tokenizers.key(spec)
        save(tmp_path, bpe, version=spec)
        assert len({before, between, tokenizers.key(spec)}) == 3
        (tmp_path / "tokenizer_config.json").unlink()
