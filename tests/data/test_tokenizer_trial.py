"""Crafted tokenizer.json files: each is an error that names it, and ends no process but that of its trial."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from jaxlm import data, files
from jaxlm.data import tokenizer_specs, tokenizer_trial
from jaxlm.data.tokenizers import END_OF_TEXT, Bytes, from_json
from jaxlm.errors import DataError


def crafted(**changes: Any) -> str:
    """A tokenizer.json that knows its end of text, with changed parts."""
    live = tokenizers.Tokenizer(tokenizers.models.WordLevel({END_OF_TEXT: 0, "a": 1}, unk_token=END_OF_TEXT))
    return json.dumps({**json.loads(live.to_str()), **changes})


def replacing(*steps: tuple[dict[str, str], str]) -> str:
    normalizers = [{"type": "Replace", "pattern": pattern, "content": content} for pattern, content in steps]
    return crafted(normalizer={"type": "Sequence", "normalizers": normalizers})


TENFOLD = ({"String": "a"}, "a" * 10)
BOMB = replacing(*[TENFOLD] * 12)
ENDLESS = replacing(*[TENFOLD] * 3, *[({"String": "a"}, "b"), ({"String": "b"}, "a")] * 1000)
PANIC = replacing(({"Regex": "(a+)+[bc]"}, ""))
HUGE = crafted(model={"type": "WordLevel", "vocab": {END_OF_TEXT: 0, "a": 2**32 - 1}, "unk_token": END_OF_TEXT})
BAD = [
    (BOMB, "in a trial in another process it died of SIGABRT: memory allocation of .* bytes failed"),
    (ENDLESS, "in a trial in another process it had not encoded a few words after 2 s"),
    (PANIC, "Onig: Regex search error: retry-limit-in-match over"),
    (HUGE, "a token has the id 4294967295; expected none above 16777216"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=["bomb", "endless", "panic", "huge"])
def test_crafted_file(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_trial, "_MEMORY", 2**29)
    if text == ENDLESS:
        monkeypatch.setattr(tokenizer_trial, "_SECONDS", 2.0)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        tokenizer_specs.build(str(tmp_path))
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}/tokenizer.json is not a tokenizer.json: ") and "\n" not in said
    assert not (tmp_path / "cache").exists(), "remembered as good"


def test_crafted_tokenizer_of_a_run_or_a_token_file(tmp_path: Path) -> None:
    ours = {"kind": "hf", "end_of_text": END_OF_TEXT, "tokenizer": json.loads(HUGE)}
    with pytest.raises(DataError, match="not a tokenizer: a token has the id 4294967295"):
        from_json(json.dumps(ours))
    beside = data.write_tokens(tmp_path / "my.bin", [np.array([1])], Bytes()).path.with_suffix(".json")
    meta = {name: value for name, value in json.loads(beside.read_text()).items() if name != "check"}
    meta["tokenizer_json"] = ours
    beside.write_text(json.dumps({**meta, "check": files.seal(meta)}))
    with pytest.raises(DataError, match="the tokenizer in .*my.json: not a tokenizer: a token has the id 4294967295"):
        data.tokenizer_of(tmp_path / "my.bin")


def test_crafted_tokenizer_of_the_hub(tmp_path: Path) -> None:
    """In a process of its own, since the library reads HF_HOME when it is imported."""
    repo = tmp_path / "hub" / "models--owner--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "snapshots" / "abc" / "tokenizer.json").write_text(PANIC)
    code = "from jaxlm import errors\nfrom jaxlm.data.tokenizer_specs import build\n"
    code += "exit(errors.exit_code(lambda: build('owner/name')))"
    env = {**os.environ, "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == DataError.exit_code
    assert done.stderr.startswith("error: can't load the tokenizer 'owner/name': ") and done.stderr.count("\n") == 1


def test_a_good_file_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer_trial.trial(crafted(), "x")
    assert len(list((tmp_path / "cache" / "tokenizers").iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("tried again"))
        tokenizer_trial.trial(crafted(), "x")
    monkeypatch.setattr(tokenizer_trial, "__version__", "another")
    tokenizer_trial.trial(crafted(), "x")
    assert len(list((tmp_path / "cache" / "tokenizers").iterdir())) == 2


def test_words_that_a_tokenizer_does_not_know_are_no_fault() -> None:
    tokenizer_trial.trial(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="<unk>")).to_str(), "x")


def test_without_a_cache_or_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "file"))
    tokenizer_trial.trial(crafted(), "x")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    with pytest.raises(DataError, match="x: can't start another process to try it in: No such file or directory"):
        tokenizer_trial.trial(crafted(), "x")


# Panics that a trial did not meet


def test_panic_of_the_library_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    with pytest.raises(DataError, match="^x: index out of bounds$"), tokenizer_trial.panics("x"):
        raise PanicException("index out of bounds\nnote: run with backtrace")
    with pytest.raises(KeyboardInterrupt), tokenizer_trial.panics("x"):
        raise KeyboardInterrupt
