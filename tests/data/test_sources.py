from __future__ import annotations

import csv
import json
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.data import hub, sources
from jaxlm.errors import ConfigError, DataError

TEXTS = ["first\n", "zweiter Text, größer", 'third "quoted"\r\nline 🙂']


def texts(spec: object, **kwargs: str) -> list[str]:
    return [document.text for document in sources.open_source(str(spec), **kwargs).read()]


def jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def folder(tmp_path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return tmp_path / "folder"


# Kinds of source


def test_stdlib_is_python_code_without_tests() -> None:
    documents = list(sources.open_source("stdlib").read())
    names = [document.name for document in documents]
    assert names == sorted(names) and "json/decoder.py" in names and "argparse.py" in names
    assert not [name for name in names if {"test", "tests", "site-packages", "idlelib"} & set(name.split("/"))]
    assert sum(len(document.text) for document in documents) > 3e6


def test_stdlib_skips_files_that_are_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = folder(tmp_path, {"a.py": "a = 1\n"})
    (top / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\n")
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(top))
    assert texts("stdlib") == ["a = 1\n"]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.log", "noext"])
def test_text_file_is_one_document_as_it_is(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes("x\r\ny\n é".encode())
    assert texts(path) == ["x\r\ny\n é"]


def test_folder_is_read_recursively_in_order(tmp_path: Path) -> None:
    top = folder(
        tmp_path,
        {"b.txt": "b", "a/z.md": "z", "a/c.py": "c", ".git/x.txt": "hidden", "image.png": "no", "empty.txt": ""},
    )
    jsonl(top / "rows.jsonl", [{"text": "row"}])
    source = sources.open_source(str(top))
    assert [(d.name, d.text) for d in source.read()] == [
        ("a/c.py", "c"),
        ("a/z.md", "z"),
        ("b.txt", "b"),
        ("rows.jsonl:1", "row"),
    ]
    assert list(source.read()) == list(source.read()), "each read starts anew"


def test_glob(tmp_path: Path) -> None:
    top = folder(tmp_path, {"a/1.txt": "1", "b/1.txt": "2", "b/2.log": "3"})
    assert texts(top / "**/*.txt") == ["1", "2"]
    names = [document.name for document in sources.open_source(str(top / "**/*.txt")).read()]
    assert names == ["a/1.txt", "b/1.txt"]
    with pytest.raises(DataError, match=r"no file matches .*\*\.csv"):
        texts(top / "*.csv")


def test_name_with_brackets_is_not_a_glob(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert texts(tmp_path / "a[1].txt") == ["x"]


def test_jsonl(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": text, "id": 1} for text in TEXTS])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\n")
    assert texts(path) == TEXTS


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    long = "x" * 200_000  # beyond the csv module's own limit
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *([i, text] for i, text in enumerate([*TEXTS, long]))])
    assert texts(path) == [*TEXTS, long]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"body": pa.array(TEXTS).cast(kind), "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", text_field="body") == TEXTS


def fake_hub(monkeypatch: pytest.MonkeyPatch, rows: list[object], seen: list[object]) -> None:
    class Dataset:
        column_names = ["text", "id"]
        dataset_size = None
        _fingerprint = "abc"

        def select_columns(self, names: list[str]) -> Dataset:
            assert names == ["text"]
            return self

        def iter(self, batch_size: int):
            yield {"text": rows}

    def load_dataset(*args: object, **kwargs: object) -> Dataset:
        seen.append((*args, kwargs))
        if args[0] == "none/such":
            raise FileNotFoundError("Dataset 'none/such' doesn't exist\nat all")
        return Dataset()

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    fake_hub(monkeypatch, TEXTS, seen)
    assert texts("hf://owner/name") == TEXTS
    assert texts("hf://owner/name/config:test") == TEXTS
    assert seen == [("owner/name", None, {"split": "train"}), ("owner/name", "config", {"split": "test"})]
    with pytest.raises(DataError, match=r"^hf://none/such: Dataset 'none/such' doesn't exist$"):
        texts("hf://none/such")
    with pytest.raises(DataError, match="no column 'body', which is data.text_field; known: id, text"):
        texts("hf://owner/name", text_field="body")
    fake_hub(monkeypatch, ["a", None], seen)
    with pytest.raises(DataError, match="row 1: 'text' is NoneType; expected a string"):
        texts("hf://owner/name")


def test_hub_dataset_without_library_or_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'jaxlm\[data\]'"):
        texts("hf://owner/name")
    fake_hub(monkeypatch, TEXTS, [])
    monkeypatch.setattr(hub, "unreachable", lambda: "no connection to huggingface.co")
    assert texts("hf://owner/name") == TEXTS, "HF_HUB_OFFLINE asks the cache"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(DataError, match="no connection to huggingface.co.*HF_HUB_OFFLINE=1"):
        texts("hf://owner/name")


def test_hub_that_does_not_answer_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "no connection to 127.0.0.1" in hub.unreachable()
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert hub.unreachable() == ""


# Bad input


@pytest.mark.parametrize(
    ("name", "hint"), [("shakespere.txt", "did you mean .*shakespeare.txt"), ("shakespeare.txt/x", "no such file")]
)
def test_missing_names_the_nearest(tmp_path: Path, name: str, hint: str) -> None:
    (tmp_path / "shakespeare.txt").write_text("x")
    with pytest.raises(DataError, match=hint):
        texts(tmp_path / name)


def test_missing_parent_and_misspelled_keyword(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path, {"a.txt": "a"})
    with pytest.raises(
        DataError, match=f"no such file or folder: {tmp_path}/foldr/a.txt; did you mean {tmp_path}/folder?"
    ):
        texts(tmp_path / "foldr/a.txt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="did you mean stdlib?"):
        texts("stdlb")
    with pytest.raises(DataError, match="no such file"):
        texts("x" * 5000)


def test_empty(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(DataError, match="a.txt is empty"):
        texts(tmp_path / "a.txt")
    with pytest.raises(DataError, match="no text in"):
        texts(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(DataError, match="no text in"):
        texts(tmp_path / "a.txt")
    with pytest.raises(DataError, match="no text in"):
        texts(jsonl(tmp_path / "b.jsonl", [{"text": ""}]))
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"holds no file with one of the suffixes \.txt"):
        texts(tmp_path / "none")


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x")

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)  # root may read anything
        with pytest.raises(DataError, match="can't read .*a.txt: Permission denied"):
            texts(tmp_path / "a.txt")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        texts("/dev/null")


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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "a.jsonl, line 2: not JSON"),
        ("[" * 100_000, "a.jsonl, line 2: not JSON"),
        ('["x"]', "a.jsonl, line 2: a JSON list; expected an object with the text in 'text'"),
        (
            '{"txt": "x", "id": 1}',
            r"line 2: no column 'text', which is data.text_field; did you mean 'txt'\? known: id, txt$",
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
        ("id,body\n1,x\n", "a.csv: no column 'text', which is data.text_field; known: body, id"),
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
    with pytest.raises(DataError, match="column 'text' is int64; expected string"):
        texts(path)
    with pytest.raises(DataError, match="row 1: 'body' is NoneType"):
        texts(path, text_field="body")
    with pytest.raises(DataError, match="no column 'none', which is data.text_field; known: body, text"):
        texts(path, text_field="none")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="a.parquet: not Parquet"):
        texts(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow: pip install 'jaxlm\[data\]'"):
        texts(path)


# Fingerprint


def test_fingerprint_is_of_names_and_content_wherever_they_lie(tmp_path: Path) -> None:
    def of(name: str, files: dict[str, str]) -> str:
        return sources.open_source(str(folder(tmp_path / name, files))).fingerprint

    base = of("1", {"a.txt": "ab", "b.txt": "c"})
    assert base == of("2", {"b.txt": "c", "a.txt": "ab"})
    others = [
        of("3", {"a.txt": "ab", "b.txt": "d"}),  # content
        of("4", {"a.txt": "ab", "c.txt": "c"}),  # name
        of("5", {"a.txt": "a", "b.txt": "bc"}),  # the same bytes in all, cut elsewhere
        of("6", {"a.txt": "ab"}),
    ]
    assert len({base, *others}) == 5


# The held-out part


@pytest.mark.parametrize(
    ("spec", "value"), [("5%", 0.05), ("0.5%", 0.005), (" 99% ", 0.99), ("", None), ("x.txt", None)]
)
def test_share(spec: str, value: float | None) -> None:
    assert sources.share(spec) == (None if value is None else pytest.approx(value))


@pytest.mark.parametrize("spec", ["0%", "100%", "-5%", "five%", "%", "nan%", "inf%"])
def test_bad_share(spec: str) -> None:
    with pytest.raises(ConfigError, match="expected more than 0% and less than 100%"):
        sources.share(spec)


def test_split_holds_out_whole_documents(tmp_path: Path) -> None:
    top = folder(tmp_path, {f"{i:03}.txt": f"{i} " * (i % 7 + 1) for i in range(300)})
    whole = sources.open_source(str(top))
    train, held = (list(part.read()) for part in sources.split(whole, 0.1))
    assert sorted(train + held) == sorted(whole.read()) and not set(train) & set(held)
    assert sum(len(d.text) for d in held) / sum(len(d.text) for d in train + held) == pytest.approx(0.1, abs=0.01)
    again = [list(part.read()) for part in sources.split(sources.open_source(str(top)), 0.1)]
    assert [train, held] == again
    # Neither the first nor the last ones, but spread.
    assert 90 < np.mean([int(d.name[:3]) for d in held]) < 210

    (top / "new.txt").write_text("new")
    held_now = set(sources.split(sources.open_source(str(top)), 0.1)[1].read())
    assert len(held_now & set(held)) >= len(held) - 1, "a new document leaves the others where they were"


def test_split_counts_and_names_its_sides(tmp_path: Path) -> None:
    whole = sources.open_source(str(folder(tmp_path, {"a.txt": "é" * 90, "b.txt": "b" * 20})))
    train, held = sources.split(whole, 0.1)
    assert (train.num_bytes, held.num_bytes) == (180, 20)
    assert len({whole.fingerprint, train.fingerprint, held.fingerprint, sources.split(whole, 0.2)[1].fingerprint}) == 4


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=50), st.floats(0.001, 0.999), st.integers(0, 2**32))
def test_held_out_leaves_a_document_on_each_side(sizes: list[int], share: float, seed: int) -> None:
    hashes = np.random.default_rng(seed).integers(0, 2**63, len(sizes), np.uint64)
    held = sources._held_out(hashes, np.array(sizes), share)
    assert 0 < held.sum() < len(sizes)


def test_one_huge_document_is_not_held_out() -> None:
    for seed in range(20):
        hashes = np.random.default_rng(seed).integers(0, 2**63, 11, np.uint64)
        held = sources._held_out(hashes, np.array([10**6] + [5_000] * 10), 0.02)
        assert not held[0] and held.sum() == 4


def test_tail_of_a_single_document_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("0123456789" * 10)
    train, held = sources.split(sources.open_source(str(path)), 0.05)
    assert [d.text[-3:] for d in train.read()] == ["234"] and [d.text for d in held.read()] == ["56789"]
    path.write_text("ab")
    assert [[d.text for d in part.read()] for part in sources.split(sources.open_source(str(path)), 0.05)] == [
        ["a"],
        ["b"],
    ]
    path.write_text("a")
    with pytest.raises(DataError, match="nothing to hold out"):
        sources.split(sources.open_source(str(path)), 0.05)
