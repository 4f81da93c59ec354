"""Which files a path, a glob or a folder names, in which order, and what is said of one that is not there."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from jaxlm.data import paths
from jaxlm.errors import DataError
from tests.data.test_sources import folder


def names(spec: object) -> list[str]:
    return [file.name for file in paths.files(str(spec))[0]]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    top = folder(tmp_path, {"z/own.txt": "own"})
    (tmp_path / "far/deep").mkdir(parents=True)
    (tmp_path / "far/deep/b.txt").write_text("b")
    (tmp_path / "far/back").symlink_to(top)
    (tmp_path / "far/deep/up").symlink_to("..")
    (top / "link").symlink_to(tmp_path / "far")
    (top / "more").symlink_to(tmp_path / "far/deep")
    (top / "a").symlink_to("z")
    (top / "gone").symlink_to("nowhere")
    assert names(top) == ["link/deep/b.txt", "z/own.txt"]


def test_glob(tmp_path: Path) -> None:
    top = folder(tmp_path, {"a/1.txt": "1", "b/1.txt": "2", "b/2.log": "3"})
    assert names(top / "**/*.txt") == ["a/1.txt", "b/1.txt"]
    with pytest.raises(DataError, match=r"no file matches .*\*\.csv"):
        names(top / "*.csv")


def test_name_with_brackets_is_not_a_glob(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert names(tmp_path / "a[1].txt") == ["a[1].txt"]


@pytest.mark.parametrize(
    ("name", "hint"), [("shakespere.txt", "did you mean .*shakespeare.txt"), ("shakespeare.txt/x", "no such file")]
)
def test_missing_names_the_nearest(tmp_path: Path, name: str, hint: str) -> None:
    (tmp_path / "shakespeare.txt").write_text("x")
    with pytest.raises(DataError, match=hint):
        names(tmp_path / name)


def test_missing_parent_and_misspelled_keyword(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path, {"a.txt": "a"})
    with pytest.raises(
        DataError, match=f"no such file or folder: {tmp_path}/foldr/a.txt; did you mean {tmp_path}/folder?"
    ):
        names(tmp_path / "foldr/a.txt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="did you mean stdlib?"):
        names("stdlb")
    with pytest.raises(DataError, match="no such file"):
        names("x" * 5000)
    with pytest.raises(DataError, match="no such file or folder: ~no-such-user/a.txt"):
        names("~no-such-user/a.txt")


def test_a_link_to_nothing_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(DataError, match=f"{tmp_path}/a.txt is a link to {tmp_path}/gone.txt, which is not there"):
        names(tmp_path / "a.txt")


def test_a_folder_says_what_it_leaves_out(tmp_path: Path) -> None:
    top = folder(tmp_path, {"a.txt": "a", "b/b.zst": "", "c.tar.gz": "", "d.ZST": "", ".hidden.zst": "", "LICENSE": ""})
    (top / "e.txt.gz").write_bytes(gzip.compress(b"e"))
    assert names(top) == ["a.txt", "e.txt.gz"]
    assert paths.files(str(top))[1] == "files with other suffixes were left out: 4 (.zst 2, .gz 1, none 1)"
    assert paths.files(str(top / "a.txt"))[1] == ""
    with pytest.raises(DataError, match=r"one of the suffixes .*; files with other suffixes .*: 1 \(.zst 1\)"):
        names(top / "b")
