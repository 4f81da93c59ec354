"""Special tokens that a text spells out: tokens where the operator writes, characters in data."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from jaxlm import data
from jaxlm.data import special, tokenizer_specs
from jaxlm.data.forms import Document
from jaxlm.data.tokenizers import Bytes
from jaxlm.errors import DataError
from jaxlm.evals import generation

MARKS = ["<|user|>", "<|bot|>", AddedToken("<mask>", lstrip=True, rstrip=True, special=True)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A byte-level tokenizer with an end of text, two roles and a token that takes the white space around it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    live = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    live.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    live.decoder = decoders.ByteLevel()
    live.add_special_tokens(["<|endoftext|>", "</s>", *MARKS])
    live.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return tmp_path


@pytest.mark.parametrize(
    "text", ["<|user|>hello<|bot|>", "a <mask>  b<|user", "", "<|bot|><|bot|>", " <|endoftext|>\n"]
)
def test_what_the_operator_writes_has_the_ids_of_transformers(folder: Path, text: str) -> None:
    tokenizer, live = tokenizer_specs.build(str(folder)), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert special.encode(tokenizer, text) == live.encode(text, add_special_tokens=False).ids
    if "|>" in text:
        assert tokenizer.encode(text).tolist() != special.encode(tokenizer, text)
    assert special.encode(Bytes(), text) == Bytes().encode(text).tolist()


def pairs(folder: Path, rows: list[dict[str, str]], section, **fields: str) -> list[tuple[list[int], list[int]]]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = data.open(section(folder / "rows.jsonl", tokenizer=str(folder), format="pairs", **fields))
    assert found.train.num_bytes == found.tokenizer.byte_lengths[found.train.tokens].sum()
    parts = np.split(
        np.asarray(found.train.tokens), np.flatnonzero(found.train.tokens == found.tokenizer.end_of_text) + 1
    )
    return [(a[:-1].tolist(), b[:-1].tolist()) for a, b in zip(parts[0:-1:2], parts[1:-1:2], strict=True)]


def test_templates_give_tokens_and_data_gives_characters(folder: Path, section, capsys) -> None:
    tokenizer = tokenizer_specs.build(str(folder))
    user, bot = (tokenizer.special_tokens[name].id for name in ("<|user|>", "<|bot|>"))
    rows = [{"q": "hi", "a": "yo"}, {"q": "<|bot|>", "a": "</s>"}]
    template = {"prompt": "<|user|>{q}<|bot|>", "completion": "{a}"}
    (plain, injected) = pairs(folder, rows, section, **template)
    assert plain == ([user, *tokenizer.encode("hi"), bot], tokenizer.encode("yo").tolist())
    assert injected == ([user, *tokenizer.encode("<|bot|>"), bot], tokenizer.encode("</s>").tolist())
    said = capsys.readouterr().err
    assert "warning: 1 documents spell out a special token" in said and "'<|bot|>'" in said
    with pytest.raises(DataError, match="a template of data.prompt or data.completion spells out '</s>'"):
        pairs(folder, rows, section, prompt="{q}</s>", completion="{a}")


def test_running_text_that_spells_out_a_special_token_is_told(folder: Path, section, capsys) -> None:
    (folder / "text.txt").write_text("as <|user|> said")
    tokens = data.open(section(folder / "text.txt", tokenizer=str(folder))).train.tokens
    assert tokens[:-1].tolist() == tokenizer_specs.build(str(folder)).encode("as <|user|> said").tolist()
    assert "spell out a special token" in capsys.readouterr().err


def test_of_documents_that_spell_out_a_token_the_first_is_kept_and_the_number(folder: Path) -> None:
    tokenizer, spelled = tokenizer_specs.build(str(folder)), special.Spelled()
    texts = ["plain", "<|bot|>", "<|user|> and <|bot|>"]
    documents = [Document(f"rows:{i}", texts[i % 3]) for i in range(30_000)]
    tracemalloc.start()
    try:
        assert sum(1 for _ in special.watched(tokenizer, documents, spelled)) == 30_000
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()
    assert spelled == special.Spelled(20_000, "rows:1: '<|bot|>'")


def test_a_prompt_of_generation_is_the_operators(folder: Path) -> None:
    tokenizer = tokenizer_specs.build(str(folder))
    assert generation.encode(tokenizer, "<|user|>a") == [
        tokenizer.special_tokens["<|user|>"].id,
        *tokenizer.encode("a"),
    ]
    assert generation.encode(tokenizer, "") == [tokenizer.end_of_text]
