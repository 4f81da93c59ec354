"""Every form of `data.tokenizer` gives its tokenizer, and a mistake in one says what is wrong and what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers as library

from jaxlm import hub
from jaxlm.data.tokenizer_specs import build, key
from jaxlm.data.tokenizers import END_OF_TEXT, Chars, Tokenizer, from_json
from jaxlm.errors import ConfigError, DataError

CORPUS = ["the cat sat on the mat\n", "the dog sat on the log\n\n  indented\n" * 20, "naïve café 🙂 \u4e2d\u6587"]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return build("bpe:300", CORPUS)


def save(folder: Path, tokenizer: Tokenizer, **changes: object) -> Path:
    """The tokenizer.json of `tokenizer`, with changed parts."""
    folder.mkdir(exist_ok=True)
    parts = json.loads(tokenizer.to_json())["tokenizer"]
    (folder / "tokenizer.json").write_text(json.dumps({**parts, **changes}))
    return folder / "tokenizer.json"


# Built from the corpus


def test_chars_are_those_of_the_corpus_sorted() -> None:
    assert build("chars", ["cab", "b🙂"]) == Chars("abc🙂")
    with pytest.raises(DataError, match="no characters"):
        build("chars", [""])


def test_bpe_is_trained_to_its_size_and_says_when_it_cannot(bpe: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    assert bpe.vocab_size == 300 and len(bpe.encode(CORPUS[0])) < len(CORPUS[0])
    assert build("bpe:257", CORPUS).vocab_size == 257
    assert capsys.readouterr().err == ""
    assert build("bpe:5000", ["abc abc"]).vocab_size < 300
    assert "bpe:5000 stopped at" in capsys.readouterr().err
    with pytest.raises(DataError, match="lone surrogate"):
        build("bpe:300", ["\ud800"])


def test_bpe_is_the_same_in_another_process(bpe: Tokenizer) -> None:
    code = f"from jaxlm.data.tokenizer_specs import build; print(build('bpe:300', {CORPUS!r}).fingerprint)"
    env = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == bpe.fingerprint


# Hugging Face files


def test_file_and_folder(bpe: Tokenizer, tmp_path: Path) -> None:
    path = save(tmp_path / "tok", bpe)
    for spec in (path, path.parent):
        tokenizer = build(str(spec))
        assert tokenizer.fingerprint == bpe.fingerprint


@pytest.mark.parametrize("spec", ["{}/tok", "~/tok"])
def test_folder_in_the_older_layout(bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "tok"
    folder.mkdir()
    model = json.loads(bpe.to_json())["tokenizer"]["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in model["merges"]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    tokenizer = build(spec.format(tmp_path))
    assert tokenizer.end_of_text == bpe.end_of_text
    np.testing.assert_array_equal(tokenizer.encode(CORPUS[1]), bpe.encode(CORPUS[1]))


@pytest.mark.parametrize("eos", ["</s>", {"content": "</s>", "lstrip": False}])
def test_end_of_text_is_the_eos_token(bpe: Tokenizer, tmp_path: Path, eos: object) -> None:
    token = {"id": 300, "content": "</s>", "special": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    path = save(tmp_path, bpe, added_tokens=[{**token, **flags}])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    tokenizer = build(str(path))
    assert tokenizer.end_of_text == 300 and tokenizer.vocab_size == 301
    assert 300 not in tokenizer.encode("a</s>b")

    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "\\ud800"}')
    assert build(str(path)).end_of_text == bpe.end_of_text
    for broken in ("{", "[" * 100_000):
        (tmp_path / "tokenizer_config.json").write_text(broken)
        with pytest.raises(DataError, match="tokenizer_config.json is not JSON"):
            build(str(path))
    for other, kind in {"[1]": "list", "5": "int", "null": "NoneType"}.items():
        (tmp_path / "tokenizer_config.json").write_text(other)
        with pytest.raises(DataError, match=f"tokenizer_config.json holds a JSON {kind}; expected an object"):
            build(str(path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    (tmp_path / "special_tokens_map.json").write_text("[1]")  # what it says isn't asked for
    assert build(str(path)).end_of_text == 300


@pytest.mark.parametrize("flagged", [False, True])
def test_the_end_of_text_is_special_whether_or_not_the_file_says_so(
    bpe: Tokenizer, tmp_path: Path, flagged: bool
) -> None:
    """A document that spelled it out was ended by it."""
    parts = json.loads(bpe.to_json())["tokenizer"]
    path = save(tmp_path, bpe, added_tokens=[{**added, "special": flagged} for added in parts["added_tokens"]])
    tokenizer = build(str(path))
    assert tokenizer.fingerprint == bpe.fingerprint and END_OF_TEXT in tokenizer.special_tokens
    assert tokenizer.end_of_text not in tokenizer.encode(f"one{END_OF_TEXT}two")


def test_other_added_tokens_are_what_the_file_says(bpe: Tokenizer, tmp_path: Path) -> None:
    live = library.Tokenizer.from_str(json.dumps(json.loads(bpe.to_json())["tokenizer"]))
    live.add_tokens(["<word>"])
    live.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build(str(tmp_path))
    assert list(tokenizer.special_tokens) == [END_OF_TEXT] and len(tokenizer.encode("<word>")) == 1


def test_no_end_of_text(tmp_path: Path) -> None:
    library.Tokenizer(library.models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"neither an eos token nor <\|endoftext\|>"):
        build(str(tmp_path))


def test_file_cannot_pad_truncate_drop_out_or_add_tokens(bpe: Tokenizer, tmp_path: Path) -> None:
    live = library.Tokenizer.from_str(json.dumps(json.loads(bpe.to_json())["tokenizer"]))
    live.enable_truncation(3)
    live.enable_padding(length=50)
    live.post_processor = library.processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, bpe.end_of_text)]
    )
    live.model.dropout = 0.9
    live.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build(str(tmp_path))
    for each in (tokenizer, from_json(tokenizer.to_json())):
        np.testing.assert_array_equal(each.encode(CORPUS[0]), bpe.encode(CORPUS[0]))


# Run directories


@pytest.mark.parametrize("spec", ["bytes", "chars", "bpe:300"])
def test_run_directory_and_its_file(tmp_path: Path, spec: str) -> None:
    tokenizer = build(spec, CORPUS)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert build(str(path)) == tokenizer


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"kind": "words"}', "tokenizer.json: not a tokenizer of jaxlm: no kind 'bytes', 'chars' or 'hf'"),
        ('{"kind": "chars"}', "tokenizer.json: not a tokenizer of jaxlm"),
        ('{"kind": "hf", "end_of_text": "x", "tokenizer": {}}', "tokenizer.json: not a tokenizer"),
        ('{"kind": "chars", "chara', "tokenizer.json is not a tokenizer.json"),
        ("[" * 100_000, "tokenizer.json is not a tokenizer.json"),
    ],
)
def test_damaged_file_of_a_run(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=message):
        build(str(tmp_path))


# Mistakes


@pytest.mark.parametrize("spec", ["bpe", "bpe:", "bpe:x", "bpe:256", "bpe:0", "bpe:-5", "bpe:1e4", "bpe:٣٠٠"])
def test_impossible_bpe(spec: str) -> None:
    with pytest.raises(ConfigError, match="expected bpe:SIZE with SIZE from 257"):
        build(spec, CORPUS)


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
        build(spec)


def test_unknown_form() -> None:
    with pytest.raises(ConfigError, match="unknown data.tokenizer 'words:100'; expected bytes, chars, bpe:SIZE"):
        build("words:100")


def test_missing_file(bpe: Tokenizer, tmp_path: Path) -> None:
    save(tmp_path, bpe)
    with pytest.raises(DataError, match="no such file or folder: .*tokeniser.json; did you mean .*tokenizer.json?"):
        build(str(tmp_path / "tokeniser.json"))
    with pytest.raises(DataError, match="no such file"):
        build("./nothing")


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b"\xff\xfe", b"null", b'{"version": "1.0", "model": {"type": "BPE"}}']
)
def test_damaged_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match="tokenizer.json"):
        build(str(tmp_path / "tokenizer.json"))


# The hub


def test_hub_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="'gpt2-none' is not in the local .* cache, and HF_HUB_OFFLINE is set. Give"):
        build("gpt2-none")
    monkeypatch.setattr(hub, "unreachable", lambda: "no connection to huggingface.co")
    with pytest.raises(DataError, match="no connection to huggingface.co. Give data.tokenizer a folder"):
        build("owner/name")


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
    code = "from jaxlm.data.tokenizer_specs import build; print(build('owner/name').encode('the cat').tolist())"
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | {"HF_HOME": str(tmp_path)}
    out = subprocess.check_output([sys.executable, "-c", code], env=env, text=True)
    assert json.loads(out) == bpe.encode("the cat").tolist()


def test_importing_data_is_quick() -> None:
    slow = ("transformers", "tokenizers", "pyarrow", "jax")
    code = f"import sys, jaxlm.data; print([name for name in {slow} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# The key of the cache


def test_key_holds_the_content_of_local_files(bpe: Tokenizer, tmp_path: Path) -> None:
    assert key("bytes") == "bytes"
    path = save(tmp_path, bpe)
    for spec in (str(path), str(tmp_path)):
        before = key(spec)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": spec}))
        between = key(spec)
        save(tmp_path, bpe, version=spec)
        assert len({before, between, key(spec)}) == 3
        (tmp_path / "tokenizer_config.json").unlink()


@pytest.mark.parametrize("name", ["vocab.txt", "spiece.model", "merges.txt", "added_tokens.json"])
def test_key_holds_all_that_an_older_folder_may_be_read_from(tmp_path: Path, name: str) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "a-folder").mkdir()
    keys = [key(str(tmp_path))]
    for content in ("a", "b"):
        (tmp_path / name).write_text(content)
        keys.append(key(str(tmp_path)))
    assert len(set(keys)) == 3
    (tmp_path / "model.safetensors").write_bytes(b"weights, which may be large")
    assert key(str(tmp_path)) == keys[-1]


def test_a_folder_without_a_tokenizer_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("none here")
    with pytest.raises(DataError, match=f"{tmp_path} holds no tokenizer: neither a tokenizer.json"):
        build(str(tmp_path))
