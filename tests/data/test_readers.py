"""Each kind of file: what it gives, and the message for one that is damaged or of another kind."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jaxlm.data import forms, readers
from jaxlm.errors import DataError

TEXTS = ["first\n", "zweiter Text, größer", 'third "quoted"\r\nline 🙂']


def texts(path: Path, text_field: str = "text", errors: str = "strict") -> list[str]:
    return [document.text for document in readers.read(readers.File(path.name, path), forms.text(text_field), errors)]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.log", "noext"])
def test_text_file_is_one_document_as_it_is(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes("x\r\ny\n é".encode())
    assert texts(path) == ["x\r\ny\n é"]


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = "".join(json.dumps({"text": text, "id": 1}) + "\r\n" for text in TEXTS)
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\n")
    assert texts(path) == TEXTS


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    long = "x" * 200_000  # beyond the csv module's own limit
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *([i, text] for i, text in enumerate([*TEXTS, long]))])
    assert texts(path) == [*TEXTS, long]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"body": pa.array(TEXTS).cast(kind), "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", text_field="body") == TEXTS


def test_few_rows_of_parquet_are_in_memory_at_once(tmp_path: Path) -> None:
    """A batch of Arrow's own size was a whole file of long documents."""
    rows = [f"{i} " * 2000 for i in range(4000)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", row_group_size=400, use_dictionary=False)
    before = pa.total_allocated_bytes()
    read = readers.read(readers.File("a", tmp_path / "a.parquet"), forms.text(), "strict")
    assert next(read).text == rows[0]
    assert pa.total_allocated_bytes() - before < sum(map(len, rows)) / 4
    assert [document.text for document in read] == rows[1:]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.csv.GZ", "a.gz"])
def test_text_that_gzip_packed(tmp_path: Path, name: str) -> None:
    rows = {"jsonl": '{"text": "a\\nb"}\n{"text": "é"}\n', "csv": 'id,text\n1,"a\nb"\n2,é\n'}
    plain = rows.get(name.split(".")[1], "é\n")
    (tmp_path / name).write_bytes(gzip.compress(plain.encode()))
    assert texts(tmp_path / name) == (["é\n"] if plain == "é\n" else ["a\nb", "é"])
    (tmp_path / name).write_bytes(gzip.compress(plain.encode())[:-9])
    with pytest.raises(DataError, match=f"can't read .*{name}: .*end-of-stream"):
        texts(tmp_path / name)
    (tmp_path / name).write_text(plain)
    with pytest.raises(DataError, match=f"can't read .*{name}: Not a gzipped file"):
        texts(tmp_path / name)


@pytest.mark.parametrize(
    ("packed", "by"),
    [
        (gzip.compress(b"a"), "gzip, .*: name it NAME.gz"),
        (bz2.compress(b"a"), "bzip2"),
        (lzma.compress(b"a"), "xz"),
        (b"\x28\xb5\x2f\xfd\x20\x01\x09\x00\x00a", "zstd"),
        (b"PK\x03\x04\x14\x00", "zip"),
    ],
    ids=["gzip", "bzip2", "xz", "zstd", "zip"],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.zst", "a.csv"])
def test_what_is_packed_otherwise_is_no_text(tmp_path: Path, packed: bytes, by: str, name: str) -> None:
    (tmp_path / name).write_bytes(packed)
    with pytest.raises(DataError, match=f"{name} is packed by {by}"):
        texts(tmp_path / name, errors="replace")


def test_not_utf8_names_file_and_position(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"latin.txt is not UTF-8 text: byte 0xe9 at position 3. data.errors=.replace."):
        texts(path)
    assert texts(path, errors="replace") == ["caf\ufffd au lait"]
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError, match="a.png is not UTF-8 text: byte 0x89 at position 0"):
        texts(picture)


def test_not_utf8_in_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match="a.jsonl is not UTF-8 text: byte 0xff at position 24"):
        texts(tmp_path / "a.jsonl")
    assert texts(tmp_path / "a.jsonl", errors="replace") == ["a", "\ufffd"]
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.array([0, 1], "<i4")), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet, row 0 is not UTF-8 text: byte 0xff at position 0"):
        texts(tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", errors="replace") == ["\ufffd"]


def test_byte_order_mark_is_dropped_at_the_start_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffa\ufeffb".encode())
    assert texts(tmp_path / "a.txt") == ["a\ufeffb"]
    (tmp_path / "a.csv").write_bytes('\ufefftext\n"a\n\ufeffb"\n'.encode())
    assert texts(tmp_path / "a.csv") == ["a\n\ufeffb"]
    pq.write_table(pa.table({"text": ["\ufeffa"]}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["\ufeffa"]


@pytest.mark.parametrize("text", ["a\r\nb\r\n", "a\rb\n", "\0a\0\0b", "x" * 2**20])
def test_a_text_is_the_same_from_each_kind_of_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\r\n", newline="")
    (tmp_path / "a.csv").write_text(f'text\r\n"{text}"\r\n', newline="")
    pq.write_table(pa.table({"text": [text]}), tmp_path / "a.parquet")
    for name in ("a.txt", "a.jsonl", "a.csv", "a.parquet"):
        assert texts(tmp_path / name) == [text]


JUNK = st.lists(
    st.sampled_from([*'{}[]":,\\ntux0 \n\r\0', "text", '{"text": "', "\\ud800", "\ufeff", "é", "1e999", "9" * 5000])
    | st.binary(max_size=3)
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=JUNK)
@example(junk=["text\n\0", "\r\n", '"a""'])
@example(junk=['"', "\n", '"'])  # a column whose name is a line's end
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet"])
@pytest.mark.parametrize("errors", ["strict", "replace"])
def test_junk_is_text_or_an_error(tmp_path: Path, name: str, errors: str, junk: list[str | bytes]) -> None:
    path = tmp_path / name
    path.write_bytes(b"".join(part if isinstance(part, bytes) else part.encode() for part in junk))
    try:
        found = texts(path, errors=errors)
    except DataError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert all(text.encode() for text in found)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "a.jsonl, line 2: not JSON"),
        ("[" * 100_000, "a.jsonl, line 2: not JSON"),
        ('["x"]', "a.jsonl, line 2: a JSON list; expected an object with the text in 'text'"),
        (
            '{"txt": "x", "id": 1}',
            r"line 2: no column 'text', which data.text_field names; did you mean 'txt'\? known: id, txt$",
        ),
        ('{"text": 3}', "line 2: 'text' is int; expected a string"),
        ('{"text": null}', "line 2: 'text' is NoneType; expected a string"),
        ('{"text": "ab\\ud83d"}', "line 2: 'text' has a lone surrogate at character 2"),
    ],
)
def test_bad_jsonl(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        texts(tmp_path / "a.jsonl")


def test_lone_surrogate_can_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d \\ud83d\\ude42"}\n')
    assert texts(tmp_path / "a.jsonl", errors="replace") == ["a\ufffd 🙂"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,body\n1,x\n", "a.csv: no column 'text', which data.text_field names; known: body, id"),
        ("id,text\n1,x\n2\n", "a.csv, line 3: 1 fields; the header has 2"),
        ('id,text\n1,"x\n', "a.csv, line 2: not CSV"),
    ],
)
def test_bad_csv(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        texts(tmp_path / "a.csv")


def test_bad_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [1, 2], "body": ["a", None]}), path)
    with pytest.raises(DataError, match="column 'text' is int64; expected a string"):
        texts(path)
    pairs = forms.pairs("{body}", "{score}")
    pq.write_table(pa.table({"body": ["a"], "score": [0.5]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="column 'score' is double; expected a string or an integer"):
        list(readers.read(readers.File("b", tmp_path / "b.parquet"), pairs, "strict"))
    with pytest.raises(DataError, match="row 1: 'body' is NoneType"):
        texts(path, text_field="body")
    with pytest.raises(DataError, match="no column 'none', which data.text_field names; known: body, text"):
        texts(path, text_field="none")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="a.parquet: not Parquet"):
        texts(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow: pip install 'jaxlm\[data\]'"):
        texts(path)


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_a_column_that_is_there_twice_is_refused(tmp_path: Path, name: str) -> None:
    if name == "a.csv":
        (tmp_path / name).write_text("text,text,id\nfirst,second,1\n")
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_arrays([pa.array(["x"])] * 2, names=["text", "text"]), tmp_path / name)
    with pytest.raises(DataError, match=f"{name}: 2 columns are called 'text', which data.text_field names"):
        texts(tmp_path / name)
