"""Columns within columns, as translation sets and SQuAD have them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxlm.data import columns, forms, readers
from jaxlm.errors import DataError

ROWS = [
    {"translation": {"en": "one", "fr": "un"}, "answers": {"text": ["a", "b"]}, "id": "x"},
    {"translation": {"en": "two", "fr": "deux"}, "answers": {"text": ["c"]}, "id": "y"},
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_path_leads_into_a_column(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    file = readers.File(path.name, path)
    form = forms.pairs("{id} {translation.en}", "{answers.text.0}: {translation.fr}")
    found = [(document.text, document.completion) for document in readers.read(file, form, "strict")]
    assert found == [("x one", "a: un"), ("y two", "c: deux")]
    for wrong in ("translation.de", "answers.text.2", "nothing.en", "id.0"):
        with pytest.raises(DataError, match=f"no column '{wrong}', which data.completion names"):
            list(readers.read(file, forms.pairs("{id}", f"{{{wrong}}}"), "strict"))


def test_a_column_of_that_name_comes_first() -> None:
    row = {"a.b": "flat", "a": {"b": "deep", "c": 3}}
    assert columns.reached(row, ["a.b", "a.c"]) == row | {"a.c": 3}
    assert columns.roots(["a.b", "a.c", "d"], row) == {"a.b": "a.b", "a.c": "a"}
