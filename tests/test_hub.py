"""Whether the hub can be asked is found out without asking it; what its cache has is not asked for at all."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest

from jaxlm import hub
from jaxlm.errors import DataError

PATTERNS = ("*.json", "*.safetensors")
NEEDED = ("config.json", "*.safetensors")


@pytest.mark.parametrize(("value", "offline"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_offline(monkeypatch: pytest.MonkeyPatch, value: str, offline: bool) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert hub.offline() == offline
    if offline:
        assert hub.unreachable() == "HF_HUB_OFFLINE is set"


def test_hub_that_does_not_answer_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "no connection to 127.0.0.1" in hub.unreachable()
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert hub.unreachable() == ""


@pytest.mark.parametrize("endpoint", ["hf-mirror.com", "localhost:8080", "https://", ""])
def test_an_endpoint_that_is_no_address_is_named(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert hub.unreachable().startswith(f"HF_ENDPOINT is {endpoint!r}; expected an address such as 'https://")


def cached(cache: Path, name: str, *files: str) -> Path:
    """A repository in a cache folder as huggingface_hub lays it out."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(snapshot.name)
    for file in files:
        (snapshot / file).write_text("{}")
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["gpt2", "owner/name-1.5b", "a_b/c"])
def test_a_name_that_can_be_on_the_hub(name: str) -> None:
    assert hub.is_id(name)


@pytest.mark.parametrize("name", ["", "a/b/c", "/a", "./a", "~/a", "a/", "a b", "grün", "a:b"])
def test_a_name_that_can_not_be_on_the_hub(name: str) -> None:
    assert not hub.is_id(name)


@pytest.mark.parametrize("name", ["gpt2", "owner/name"])
def test_what_the_cache_has_is_found_without_a_network(cache: Path, name: str) -> None:
    folder = cached(cache, name, "config.json", "model.safetensors")
    assert hub.snapshot(name, PATTERNS, NEEDED) == folder


def test_what_the_cache_lacks_is_named_where_the_hub_can_not_be_asked(cache: Path) -> None:
    with pytest.raises(DataError, match=r"'owner/name' is not in the local .*HF_HUB_OFFLINE is set.*save_pretrained"):
        hub.snapshot("owner/name", PATTERNS, NEEDED)
    cached(cache, "gpt2", "config.json", "tokenizer.json")
    with pytest.raises(DataError, match=r"'gpt2' in the local .* lacks \*.safetensors; and HF_HUB_OFFLINE.*HF_HOME"):
        hub.snapshot("gpt2", PATTERNS, NEEDED)


def test_a_model_in_another_format_is_left_to_its_reader(cache: Path) -> None:
    folder = cached(cache, "gpt2", "config.json", "pytorch_model.bin")
    assert hub.snapshot("gpt2", PATTERNS, NEEDED) == folder


def test_what_the_cache_lacks_is_fetched_where_the_hub_answers(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cached(cache, "gpt2", "config.json")
    asked = []

    def download(name: str, allow_patterns: list[str], local_files_only: bool) -> str:
        if not local_files_only:
            asked.append((name, allow_patterns))
            if name == "gpt2":
                (folder / "model.safetensors").write_text("")
            elif name == "nothing":
                raise OSError("404: no such repository\nand more")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "unreachable", lambda: "")
    with pytest.raises(DataError, match="'only-bin' on the hub lacks .*safetensors.*convert it"):
        hub.snapshot("only-bin", PATTERNS, NEEDED)
    with pytest.raises(DataError, match="can't fetch 'nothing' from the hub: 404: no such repository$"):
        hub.snapshot("nothing", PATTERNS, NEEDED)
    assert hub.snapshot("gpt2", PATTERNS, NEEDED) == folder
    assert asked[-1] == ("gpt2", list(PATTERNS))
