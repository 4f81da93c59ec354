import json

import pytest

from jaxlm import config
from jaxlm.data.tokenizers import Bytes, Chars
from jaxlm.errors import ConfigError, DataError
from jaxlm.training import rundir
from tests.tiny import resolved


def begun(workdir, **fields):
    """A directory in which a run has written a row of metrics."""
    rundir.prepare(workdir, resolved(**fields), Bytes())
    (workdir / "metrics.jsonl").write_text('{"step": 1}\n')


def test_prepare_writes_config_and_tokenizer_that_read_back(tmp_path):
    assert rundir.prepare(tmp_path, resolved(), Bytes()) == []
    assert rundir.read_config(tmp_path) == resolved()
    assert rundir.read_tokenizer(tmp_path) == Bytes()


def test_what_breaks_off_between_its_files_can_be_started_again(tmp_path, monkeypatch):
    write = rundir.write

    def full(path, text):
        if path.name == "tokenizer.json":
            raise DataError("make room")
        write(path, text)

    with monkeypatch.context() as patched:
        patched.setattr(rundir, "write", full)
        with pytest.raises(DataError, match="make room"):
            rundir.prepare(tmp_path, resolved(), Bytes())
    assert rundir.prepare(tmp_path, resolved(), Bytes()) == []


def test_the_directory_of_a_study_is_not_that_of_a_run(tmp_path):
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a study's directory; give the run another --workdir"):
        rundir.prepare(tmp_path, resolved(), Bytes())
    assert not (tmp_path / "config.json").exists()


def test_every_free_field_exists():
    paths = config.flat(config.default())
    assert all(any(path.startswith(free) for path in paths) for free in rundir.FREE)


@pytest.mark.parametrize(
    "change", [{"steps": 9}, {"log__every": 7}, {"data__micro_batches": 2}, {"model__remat": "dots"}]
)
def test_fields_that_move_no_bit_of_the_past_may_change_and_are_said(tmp_path, change):
    begun(tmp_path)
    [line] = rundir.prepare(tmp_path, resolved(**change), Bytes())
    [path] = change
    assert line.startswith(f"{path.replace('__', '.')} changed from ")
    assert rundir.read_config(tmp_path) == resolved(**change)


@pytest.mark.parametrize("change", [{"seed": 1}, {"model__dropout": 0.1}, {"optimizer__scale_by_adam__b2": 0.9}])
def test_other_fields_may_not_and_the_old_config_stays(tmp_path, change):
    begun(tmp_path)
    with pytest.raises(ConfigError, match=r"was .*, is .*another --workdir"):
        rundir.prepare(tmp_path, resolved(**change), Bytes())
    assert rundir.read_config(tmp_path) == resolved()


def test_a_run_that_never_began_leaves_its_place_to_another(tmp_path):
    rundir.prepare(tmp_path, resolved(seed=1), Bytes())
    assert rundir.prepare(tmp_path, resolved(), Chars("abc")) == []
    assert rundir.read_config(tmp_path) == resolved() and rundir.read_tokenizer(tmp_path) == Chars("abc")
    (tmp_path / "checkpoints" / "8").mkdir(parents=True)
    (tmp_path / "checkpoints" / "8" / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="seed was 0, is 1"):
        rundir.prepare(tmp_path, resolved(seed=1), Chars("abc"))


def test_a_secret_that_is_no_longer_known_keeps_no_run_from_going_on(tmp_path, monkeypatch):
    cfg = resolved(data__source="corpus-of-4711-4711.txt")
    monkeypatch.setenv("MY_SECRET", "4711-4711")
    begun(tmp_path, data__source="corpus-of-4711-4711.txt")
    assert rundir.read_config(tmp_path).data.source == "corpus-of-<redacted>.txt"
    monkeypatch.delenv("MY_SECRET")
    assert len(rundir.prepare(tmp_path, cfg, Bytes())) == 1


def test_another_tokenizer_is_refused(tmp_path):
    begun(tmp_path)
    with pytest.raises(DataError, match="differs from the one"):
        rundir.prepare(tmp_path, resolved(), Chars("abc"))


def test_a_folder_that_is_no_run_and_a_damaged_config_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no run directory: it has no config.json"):
        rundir.read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"steps": 1')
    with pytest.raises(DataError, match="not a config"):
        rundir.read_config(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(DataError, match="tokenizer.json: "):
        rundir.read_tokenizer(tmp_path)


def test_status_is_written_whole(tmp_path):
    rundir.write_status(tmp_path, "running", 3)
    assert json.loads((tmp_path / "status.json").read_text()).items() >= {"status": "running", "step": 3}.items()
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    assert rundir.read_status(tmp_path) == ("running", 3)
    rundir.write_status(tmp_path, "stopped early", 3, 2)
    assert json.loads((tmp_path / "status.json").read_text())["result"] == 2
    assert rundir.read_status(tmp_path) == ("stopped early", 3)


@pytest.mark.parametrize(
    "text",
    [None, "", '{"status": "do', "[]", "null", "{}", "3", "\xff", '{"status": "done"}', "[" * 100_000]
    + ['{"status": "done", "step": inf}', '{"status": "done", "step": 4.0}'],
)
def test_a_status_that_can_not_be_read_is_none(tmp_path, text):
    if text is not None:
        (tmp_path / "status.json").write_bytes(text.encode("latin-1"))
    assert rundir.read_status(tmp_path) is None
    assert rundir.read_status(tmp_path / "nowhere") is None
