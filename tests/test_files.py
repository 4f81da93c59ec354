from __future__ import annotations

from pathlib import Path

import pytest

from jaxlm.errors import ConfigError, DataError
from jaxlm.files import atomic, cache_dir, workdir


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
    assert cache_dir("~/x") == Path.home() / "x"
    assert cache_dir("~no_such_user/x") == Path("~no_such_user/x")
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("JAXLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/jaxlm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache/jaxlm"


def test_without_a_home_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("JAXLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(DataError, match="no home directory to cache in; set JAXLM_CACHE"):
        cache_dir()


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(ZeroDivisionError), atomic(path) as file:
        file.write(b"half")
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []
    with atomic(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole" and list(tmp_path.iterdir()) == [path]


def test_a_workdir_is_what_is_given_or_the_usual_one() -> None:
    assert workdir(None, "runs/x") == Path("runs/x") and workdir("~/y", "runs/x") == Path.home() / "y"
    with pytest.raises(ConfigError, match="--workdir is empty; expected a directory, or no --workdir for runs/x"):
        workdir("", "runs/x")
