"""What is exported, as transformers' AutoTokenizer and jaxlm itself read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxlm.data import tokenizer_export, tokenizer_specs
from jaxlm.data.tokenizers import END_OF_TEXT, Tokenizer
from jaxlm.errors import DataError

ALPHABET = " \t\n\r\u00a0\u2028\u3000\x00ab1.,'<|>endofx\u0301é\u4e2d🙂\U0001f468\u200d\ufeff\u2581"
CORPUS = [ALPHABET, "the cat  sat\n\n on the mat .\n" * 20]
KINDS = ("bytes", "chars", "bpe:320")


class Exported(NamedTuple):
    ours: Tokenizer
    folder: Path
    theirs: Any


def export(tokenizer: Tokenizer, folder: Path) -> Exported:
    from transformers import AutoTokenizer

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    for name, text in tokenizer_export.files(tokenizer, 32).items():
        (folder / name).write_text(text, encoding="utf-8")
    return Exported(tokenizer, folder, AutoTokenizer.from_pretrained(str(folder)))


@pytest.fixture(scope="module", params=KINDS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(tokenizer_specs.build(request.param, CORPUS), tmp_path_factory.mktemp("tokenizer"))


def assert_agree(exported: Exported, text: str) -> None:
    assume(END_OF_TEXT not in text)  # a test of its own
    ids = exported.ours.encode(text).tolist()
    assert exported.theirs(text)["input_ids"] == ids
    assert exported.theirs.decode(ids) == text


@settings(max_examples=200)
@given(text=st.text(ALPHABET))
def test_ids_and_text_are_the_same_in_transformers(exported: Exported, text: str) -> None:
    assert_agree(exported, text)


@settings(max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_unicode_is_the_same_where_it_can_be_encoded(exported: Exported, text: str) -> None:
    if exported.ours.to_json().startswith('{"kind": "chars"'):
        text = "".join(c for c in text if c in ALPHABET)
    assert_agree(exported, text)


@settings(max_examples=100)
@given(ids=st.lists(st.integers(0, 255)))
def test_bytes_that_are_not_utf8_decode_the_same(bytes_: Exported, ids: list[int]) -> None:
    assert bytes_.theirs.decode(ids) == bytes_.ours.decode(ids)


@pytest.fixture(scope="module")
def bytes_(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(tokenizer_specs.build("bytes"), tmp_path_factory.mktemp("bytes"))


def test_special_tokens_and_context(exported: Exported) -> None:
    ours, _, theirs = exported
    assert len(theirs) == ours.vocab_size
    assert {theirs.eos_token_id, theirs.bos_token_id, theirs.unk_token_id} == {ours.end_of_text}
    assert theirs.eos_token == END_OF_TEXT and theirs.model_max_length == 32
    assert not theirs.clean_up_tokenization_spaces


def test_an_end_of_text_spelled_out_is_text_here_and_the_token_there(exported: Exported) -> None:
    ours, _, theirs = exported
    text = f"a{END_OF_TEXT}b"
    assert ours.end_of_text not in ours.encode(text)
    assert ours.end_of_text in theirs(text)["input_ids"]
    assert theirs(text, split_special_tokens=True)["input_ids"] == ours.encode(text).tolist()


@settings(max_examples=100)
@given(text=st.text(ALPHABET))
def test_jaxlm_reads_the_folder_back(exported: Exported, text: str) -> None:
    again = tokenizer_specs.build(str(exported.folder))
    ids = exported.ours.encode(text)
    np.testing.assert_array_equal(again.encode(text), ids)
    assert again.decode(ids) == text
    assert (again.vocab_size, again.end_of_text) == (exported.ours.vocab_size, exported.ours.end_of_text)


def test_a_second_export_is_the_same_files(exported: Exported) -> None:
    again = tokenizer_specs.build(str(exported.folder))
    for name, text in tokenizer_export.files(again, 32).items():
        assert text == (exported.folder / name).read_text(), name


def test_a_tokenizer_that_puts_a_space_first_keeps_doing_so(tmp_path: Path) -> None:
    parts = json.loads(tokenizer_specs.build("bpe:300", CORPUS).to_json())["tokenizer"]
    parts["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    ours, _, theirs = export(tokenizer_specs.build(str(tmp_path)), tmp_path / "out")
    assert theirs("cat")["input_ids"] == ours.encode("cat").tolist() == ours.encode(" cat").tolist()
    assert theirs.add_prefix_space


ROBERTA = {
    "type": "RobertaProcessing",
    "sep": ["b", 1],
    "cls": ["a", 0],
    "trim_offsets": True,
    "add_prefix_space": True,
}
PIECES = [{"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": PIECES,
    "pair": [*PIECES, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"a": {"id": "a", "ids": [0], "tokens": ["a"]}},
}
OFFSETS = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


@pytest.mark.parametrize("processor", [ROBERTA, TEMPLATE, {"type": "Sequence", "processors": [OFFSETS, TEMPLATE]}])
def test_special_tokens_that_are_not_added_here_are_not_added_there(tmp_path: Path, processor: dict[str, Any]) -> None:
    parts = json.loads(tokenizer_specs.build("bpe:300", CORPUS).to_json())["tokenizer"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts | {"post_processor": processor}))
    ours, _, theirs = export(tokenizer_specs.build(str(tmp_path)), tmp_path / "out")
    assert theirs("the cat")["input_ids"] == ours.encode("the cat").tolist()


def test_a_post_processor_of_offsets_stays(tmp_path: Path) -> None:
    parts = json.loads(tokenizer_specs.build("bpe:300", CORPUS).to_json())["tokenizer"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts | {"post_processor": OFFSETS}))
    _, folder, _ = export(tokenizer_specs.build(str(tmp_path)), tmp_path / "out")
    assert json.loads((folder / "tokenizer.json").read_text())["post_processor"] == OFFSETS


def test_another_end_of_text_token_stays(tmp_path: Path) -> None:
    parts = json.loads(tokenizer_specs.build("bpe:300", CORPUS).to_json())["tokenizer"]
    end = {"id": 300, "content": "</s>", "special": True, "normalized": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(parts | {"added_tokens": [*parts["added_tokens"], end | flags]})
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    ours, folder, theirs = export(tokenizer_specs.build(str(tmp_path)), tmp_path / "out")
    assert theirs.eos_token_id == ours.end_of_text == tokenizer_specs.build(str(folder)).end_of_text == 300


def test_an_unknown_character_is_an_error_after_the_export_too(tmp_path: Path) -> None:
    _, folder, theirs = export(tokenizer_specs.build("chars", ["abc"]), tmp_path / "chars")
    with pytest.raises(Exception, match=r"Missing \[UNK\] token"):
        theirs("abx")
    with pytest.raises(DataError, match="can't encode this text"):
        tokenizer_specs.build(str(folder)).encode("abx")


def test_what_the_source_calls_its_tokens_and_its_chat_template_stay(tmp_path: Path) -> None:
    """Through a run's tokenizer.json and an export: to pad, and to apply the template."""
    source, run = tmp_path / "source", tmp_path / "run.json"
    made = export(tokenizer_specs.build("bpe:320", CORPUS), source)
    made.theirs.add_special_tokens({"bos_token": "<s>", "pad_token": "<pad>"})
    made.theirs.chat_template = "{% for m in messages %}{{ bos_token + m['content'] }}{% endfor %}"
    made.theirs.save_pretrained(source)
    plain, tokenizer = made.ours, tokenizer_specs.build(str(source))
    run.write_text(tokenizer.to_json())
    again = export(tokenizer_specs.build(str(run)), tmp_path / "exported")
    assert again.theirs(["a", "the cat"], padding=True)["input_ids"][0][-1] == again.theirs.pad_token_id
    assert again.theirs.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<s>x"
    bos, pad = (again.theirs.convert_tokens_to_ids(name) for name in ("<s>", "<pad>"))
    ids = {"bos_token_id": bos, "eos_token_id": tokenizer.end_of_text, "pad_token_id": pad}
    assert tokenizer_export.special_ids(again.ours) == ids
    assert again.ours.fingerprint == tokenizer.fingerprint != plain.fingerprint
    assert (tokenizer_export.begins(again.ours), tokenizer_export.begins(plain)) == ("<s>", "")
    (source / "chat_template.jinja").unlink(missing_ok=True)
    assert tokenizer_specs.build(str(source)).fingerprint == tokenizer.fingerprint  # which is of ids
    assert tokenizer_export.special_ids(plain) == dict.fromkeys(("bos_token_id", "eos_token_id"), plain.end_of_text)
