"""A row as a document, a prompt and a completion; and templates that are none."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxlm.data import Document, forms, heldout, open_source
from jaxlm.errors import ConfigError, DataError

ROWS = [{"text": "good film", "label": "pos"}, {"text": "bad {film}", "label": "neg"}]
FORM = forms.pairs("{text}\nSentiment:", " {label}")
PAIRS = [("good film\nSentiment:", " pos"), ("bad {film}\nSentiment:", " neg")]


def written(tmp_path, kind, rows):
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "csv":
        path.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_row_becomes_a_prompt_and_a_completion(tmp_path, kind):
    found = list(open_source(str(written(tmp_path, kind, ROWS)), form=FORM).read())
    assert [(document.text, document.completion) for document in found] == PAIRS
    assert len({document.name for document in found}) == 2


def test_a_prompt_may_be_empty_and_braces_are_doubled(tmp_path):
    form = forms.pairs("", "{{{label}}}")
    found = list(open_source(str(written(tmp_path, "jsonl", ROWS)), form=form).read())
    assert [(document.text, document.completion) for document in found] == [("", "{pos}"), ("", "{neg}")]


@pytest.mark.parametrize(
    ("prompt", "completion", "told"),
    [
        ("{text", "{label}", "data.prompt='{text' is no template: expected '}' before end of string; a brace itself"),
        ("{text!r}", "{label}", "data.prompt='{text!r}' is no template: expected names of columns in braces"),
        ("{text:>9}", "{label}", "expected names of columns in braces, as {text}"),
        ("{}", "{label}", "expected names of columns in braces, as {text}"),
        ("{a: b}", "{label}", "expected names of columns in braces, as {text}, none of them with : or !"),
        ("{text}", "yes", "data.completion='yes' names no column; write such as 'data.completion={label}'"),
    ],
)
def test_what_is_no_template(prompt, completion, told):
    with pytest.raises(ConfigError) as error:
        forms.pairs(prompt, completion)
    assert told in str(error.value)


@pytest.mark.parametrize("column", ["review text", "answers.text", "0", "class", "a[0]"])
def test_a_column_may_have_any_name_without_braces_colon_and_exclamation_mark(tmp_path, column):
    (tmp_path / "a.csv").write_text(f"{column},label\ngood film,pos\n")
    pq.write_table(pa.table({column: ["good film"], "label": ["pos"]}), tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        source = open_source(str(tmp_path / name), form=forms.pairs(f"{{{column}}}:", "{label}{label}"))
        assert [(document.text, document.completion) for document in source.read()] == [("good film:", "pospos")]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "function"])
def test_an_integer_in_a_template_is_its_digits(tmp_path, monkeypatch, kind):
    rows = [{"text": "good film", "label": 1}, {"text": "bad film", "label": -20}]
    if kind == "function":
        code = f"import numpy as np\ndef rows(): return [row | {{'label': np.int64(row['label'])}} for row in {rows}]"
        (tmp_path / "rows_of_ints.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        spec = "rows_of_ints:rows"
    else:
        spec = str(written(tmp_path, kind, rows))
    assert [document.completion for document in open_source(spec, form=FORM).read()] == [" 1", " -20"]
    with pytest.raises(DataError, match="'label' is int(64)?; expected a string$"):
        list(open_source(spec, form=forms.text("label")).read())


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_column_that_is_not_there(tmp_path, kind):
    path = written(tmp_path, kind, ROWS)
    with pytest.raises(
        DataError, match="no column 'txt', which data.prompt names; did you mean 'text'. known: label, "
    ):
        list(open_source(str(path), form=forms.pairs("{txt}", "{label}")).read())
    with pytest.raises(DataError, match="no column 'answer', which data.completion names; known: label, text"):
        list(open_source(str(path), form=forms.pairs("{text}", "{answer}")).read())


def test_rows_that_are_no_pairs(tmp_path):
    def read(row):
        return list(open_source(str(written(tmp_path, "jsonl", [ROWS[0], row])), form=FORM).read())

    for value in (1.0, True, None):  # these are spelled in more ways than one, or none
        what = type(value).__name__
        with pytest.raises(DataError, match=f"rows.jsonl, line 2: 'label' is {what}; expected a string or an integer"):
            read({"text": "a", "label": value})
    with pytest.raises(DataError, match="rows.jsonl, line 2: the completion is empty, by data.completion=' {label}'"):
        read({"text": "a", "label": " "})
    (tmp_path / "a.txt").write_text("plain")
    with pytest.raises(DataError, match="a.txt is text, and has no pairs; they are rows of .jsonl, .csv, .parquet or"):
        list(open_source(str(tmp_path / "a.txt"), form=FORM).read())


def test_pairs_are_held_out_whole(tmp_path):
    rows = [{"text": f"question {i}", "label": "x" * (i % 7 + 1)} for i in range(50)]
    source = open_source(str(written(tmp_path, "jsonl", rows)), form=FORM)
    train, held = (list(part.read()) for part in heldout.split(source, 0.2))
    assert sorted(train + held) == sorted(source.read()) and 5 <= len(held) <= 15
    alone = open_source(str(written(tmp_path, "csv", ROWS[:1])), form=FORM)
    with pytest.raises(DataError, match='is one pair: nothing to hold out; set data.validation=""'):
        heldout.split(alone, 0.2)


def test_pairs_read_otherwise_are_other_data():
    assert forms.text("a").key != forms.text("b").key
    assert len({json.dumps(forms.pairs(p, c).key) for p in ("{a}", "{b}") for c in ("{c}", "{d}")}) == 4
    assert next(forms.text().documents("n", "w", {"text": "t"})) == Document("n", "t", None)
    assert list(forms.text().documents("n", "w", {"text": ""})) == []
