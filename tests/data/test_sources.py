"""What a spec names: its documents, in an order and with a fingerprint that are the same everywhere, or an error."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from jaxlm import hub
from jaxlm.data import forms, paths, sources
from jaxlm.errors import ConfigError, DataError

TEXTS = ["first\n", "zweiter Text, größer"]


def texts(spec: object, text_field: str = "text", errors: str = "strict") -> list[str]:
    source = sources.open_source(str(spec), form=forms.text(text_field), errors=errors)
    return [document.text for document in source.read()]


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
    monkeypatch.setattr(paths.sysconfig, "get_path", lambda name: str(top))
    assert texts("stdlib") == ["a = 1\n"]


def test_folder_is_read_recursively_in_order(tmp_path: Path) -> None:
    top = folder(
        tmp_path,
        {"b.txt": "b", "a/z.md": "z", "a/c.py": "c", ".git/x.txt": "hidden", "image.png": "no", "empty.txt": ""},
    )
    (top / "rows.jsonl").write_text('{"text": "row"}')
    source = sources.open_source(str(top))
    assert [(d.name, d.text) for d in source.read()] == [
        ("a/c.py", "c"),
        ("a/z.md", "z"),
        ("b.txt", "b"),
        ("rows.jsonl:1", "row"),
    ]
    assert list(source.read()) == list(source.read()), "each read starts anew"


def test_text_field_and_errors_reach_the_reader(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "\xff"}')
    assert texts(tmp_path / "a.jsonl", text_field="body", errors="replace") == ["\ufffd"]


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
    with pytest.raises(DataError, match="no column 'body', which data.text_field names; known: id, text"):
        texts("hf://owner/name", text_field="body")
    fake_hub(monkeypatch, ["a", None], seen)
    with pytest.raises(DataError, match="row 1: 'text' is NoneType; expected a string"):
        texts("hf://owner/name")
    fake_hub(monkeypatch, [0, 1], seen)  # as those of a ClassLabel come
    source = sources.open_source("hf://owner/name", form=forms.pairs("", "{text}"))
    assert [document.completion for document in source.read()] == ["0", "1"]


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


# Bad input

# Functions


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_rows.py").write_text(
        """
ROWS = [{"text": "first\\n", "n": 1}, {"text": "", "n": 2}, {"text": "zweiter Text, größer", "n": 3}]
rows = lambda: iter(ROWS)
def lists(): return [["first"]]
def numbers(): return [{"text": 5}]
def nothing(): return []
def keyed(): return [{1: "a", "text": "b"}, {2: "a", "txt": "c"}]
def none(): pass
def breaks():
    yield ROWS[0]
    yield ROWS[3]
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rows", raising=False)
    return "my_rows"


def test_a_function_gives_rows(module: str) -> None:
    assert texts(f"{module}:rows") == TEXTS
    source = sources.open_source(f"{module}:rows")
    assert [document.name for document in source.read()] == ["0", "2"]
    assert source.num_bytes >= len("".join(TEXTS).encode())


def test_the_fingerprint_of_a_function_is_of_the_columns_that_are_read(module: str) -> None:
    before = sources.open_source(f"{module}:rows").fingerprint
    sys.modules[module].ROWS[0]["n"] = 7  # type: ignore[attr-defined]
    assert sources.open_source(f"{module}:rows").fingerprint == before
    sys.modules[module].ROWS[0]["text"] = "First"  # type: ignore[attr-defined]
    assert sources.open_source(f"{module}:rows").fingerprint != before


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("lists", "row 0: list; expected a dict of columns"),
        ("numbers", "row 0: 'text' is int; expected a string"),
        ("nothing", "no text in my_rows:nothing"),
        ("keyed", "row 1: no column 'text', which data.text_field names; did you mean 'txt'[?] known: 2, txt"),
        ("none", "my_rows:none gave NoneType; expected rows, each a dict of columns"),
    ],
)
def test_a_function_that_gives_no_rows_of_text(module: str, function: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        texts(f"{module}:{function}")


def test_what_a_function_raises_names_it_and_its_line(module: str) -> None:
    with pytest.raises(ConfigError, match=r"data source 'my_rows:breaks': .*my_rows.py, line 11: IndexError: "):
        texts(f"{module}:breaks")
    with pytest.raises(ConfigError, match="data source 'json:dumps': .*TypeError: dumps"):
        texts("json:dumps")


def test_a_function_without_the_column_names_those_there_are(module: str) -> None:
    with pytest.raises(DataError, match="no column 'label', which data.text_field names; .*known: n, text"):
        texts(f"{module}:rows", text_field="label")


def test_a_function_that_is_not_there(module: str) -> None:
    with pytest.raises(ConfigError, match="'my_rows' has no function 'row': did you mean 'rows'"):
        sources.open_source(f"{module}:row")


def test_a_file_of_such_a_name_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").write_text("text")
    assert texts("a:b") == ["text"]


def test_empty(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(DataError, match="a.txt is empty"):
        texts(tmp_path / "a.txt")
    with pytest.raises(DataError, match="no text in"):
        texts(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(DataError, match="no text in"):
        texts(tmp_path / "a.txt")
    (tmp_path / "b.jsonl").write_text('{"text": ""}')
    with pytest.raises(DataError, match="no text in"):
        texts(tmp_path / "b.jsonl")
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


@pytest.mark.parametrize("spec", ["hf://", "hf:///a", "hf://a//b", "hf://a/b/c/d"])
def test_what_names_no_dataset_is_refused(spec: str) -> None:
    with pytest.raises(DataError, match="names no dataset; expected hf://name"):
        sources.open_source(spec)
