"""No test of the data room touches the user's cache or asks the network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxlm import config


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def section():
    """`section(source, ...)` is a data section as in a config."""

    def make(source: object, **fields: object) -> SimpleNamespace:
        changes = {"source": str(source), "validation": ""} | {name: str(value) for name, value in fields.items()}
        return SimpleNamespace(**config.default().data.to_dict() | changes)

    return make
