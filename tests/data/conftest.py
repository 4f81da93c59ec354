"""No test of the data room touches the user's cache or asks the network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def section():
    """`section(source, ...)` is a data section as in a config."""

    def make(source: object, **fields: object) -> SimpleNamespace:
        defaults = {"validation": "", "tokenizer": "bytes", "text_field": "text", "errors": "strict", "cache_dir": ""}
        return SimpleNamespace(source=str(source), **{**defaults, **{k: str(v) for k, v in fields.items()}})

    return make
