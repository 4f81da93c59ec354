import contextlib
import json
import math
import resource
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm import config
from jaxlm.errors import ConfigError, DataError
from jaxlm.telemetry.writers import Writers, open_writers, read_jsonl

CONFIG = config.resolve(config.default())


def steps(workdir):
    return [row["step"] for row in read_jsonl(workdir / "metrics.jsonl")]


def opened(names, workdir, resume_step=0, cfg=CONFIG, say=print):
    return open_writers(names, workdir, cfg, resume_step, say)


def write(workdir, wanted, resume_step=0, names=("jsonl",)):
    with opened(names, workdir, resume_step) as writers:
        for step in wanted:
            writers.write(step, {"train/loss": 1 / step})


class TestJsonl:
    def test_row(self, tmp_path):
        with opened(["jsonl"], tmp_path / "new" / "run") as writers:
            writers.write(10, {"train/loss": 3.25, "optim/grad_norm": 0.1})
            # before close: a reader, or a kill, sees each row at once
            row = json.loads((tmp_path / "new" / "run" / "metrics.jsonl").read_text())
        assert list(row) == ["step", "time", "train/loss", "optim/grad_norm"]
        assert (row["step"], row["train/loss"], row["optim/grad_norm"]) == (10, 3.25, 0.1)
        assert row["time"] == round(row["time"], 3) > 1.7e9

    def test_non_finite_numbers_are_strings_in_json_and_floats_when_read(self, tmp_path):
        with opened(["jsonl"], tmp_path) as writers:
            writers.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf})

        def refuse(name):
            raise AssertionError(f"{name} is not JSON")

        raw = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
        assert (raw["a"], raw["b"], raw["c"]) == ("nan", "inf", "-inf")
        (row,) = read_jsonl(tmp_path / "metrics.jsonl")
        assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == -math.inf

    @pytest.mark.parametrize(("resume_step", "left"), [(0, []), (2, [1, 2]), (3, [1, 2, 3]), (9, [1, 2, 3, 4])])
    def test_resume_drops_later_rows(self, tmp_path, resume_step, left):
        write(tmp_path, [1, 2, 3, 4])
        write(tmp_path, [], resume_step)
        assert steps(tmp_path) == left
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]

    def test_kept_rows_keep_their_bytes(self, tmp_path):
        write(tmp_path, [1, 2])
        path = tmp_path / "metrics.jsonl"
        old = path.read_bytes()
        write(tmp_path, [3], resume_step=2)
        assert path.read_bytes().startswith(old)

    @settings(max_examples=60)
    @given(share=st.floats(0, 1), resume_step=st.integers(0, 5))
    def test_a_run_killed_anywhere_resumes_without_doubles_or_gaps(self, share, resume_step):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "metrics.jsonl"
            write(Path(folder), range(1, 6))
            whole = path.read_bytes()
            torn = whole[: round(share * len(whole))]
            path.write_bytes(torn)
            complete = torn.count(b"}")
            assert steps(path.parent) == list(range(1, complete + 1))
            resume_step = min(resume_step, complete)  # a checkpoint's rows were flushed before it
            write(path.parent, range(resume_step + 1, 6), resume_step)
            assert steps(path.parent) == [1, 2, 3, 4, 5]
            assert path.read_bytes().endswith(b"\n")

    def test_zeros_that_a_power_loss_left_are_torn_too(self, tmp_path):
        write(tmp_path, [1, 2])
        with (tmp_path / "metrics.jsonl").open("ab") as file:
            file.write(bytes(100))
        assert steps(tmp_path) == [1, 2]

    @pytest.mark.parametrize("line", ["{torn", "12", '{"loss": 1}'])
    def test_damage_before_the_last_line_is_an_error(self, tmp_path, line):
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
        with pytest.raises(DataError, match="row 2 of 3"):
            read_jsonl(path)


@contextlib.contextmanager
def full(size):
    """As if the disk had no room for more of a file than so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Failing:
    def __init__(self):
        self.calls = []

    def write(self, step, metrics):
        self.calls.append(step)
        raise RuntimeError("broken\nfor good")

    def close(self):
        raise OSError("not closed\neither")


class Recording:
    def __init__(self):
        self.rows, self.closed = [], 0

    def write(self, step, metrics):
        self.rows.append((step, dict(metrics)))

    def close(self):
        self.closed += 1


class TestWriters:
    def test_a_failing_writer_is_switched_off_with_one_line(self, capsys):
        failing, recording = Failing(), Recording()
        said = []
        with Writers({"bad": failing, "good": recording}, said.append) as writers:
            writers.write(1, {"loss": 1})
            writers.write(2, {"loss": 2})
        assert failing.calls == [1]
        assert recording.rows == [(1, {"loss": 1.0}), (2, {"loss": 2.0})] and recording.closed == 1
        assert said == ["warning: writer 'bad' is off from step 1: RuntimeError: broken for good"]
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize("limit", range(120, 400, 17))
    @pytest.mark.parametrize("name", ["jsonl", "tensorboard"])
    def test_what_a_full_disk_keeps_out_is_written_once_there_is_room(self, tmp_path, name, limit):
        said = []
        with opened([name], tmp_path, say=said.append) as writers:
            (file,) = tmp_path.iterdir()
            writers.write(1, {"train/loss": 1.0})
            with full(limit):
                for step in range(2, 20):
                    writers.write(step, {"train/loss": 1 / step})
                assert file.stat().st_size == limit
            writers.write(20, {"train/loss": 1 / 20})
        failed, again = said
        assert failed.startswith(f"warning: writer {name!r} can't write step ") and "File too large" in failed
        assert again == f"writer {name!r} writes again, from step 20"
        found = steps(tmp_path) if name == "jsonl" else [event.step for event in events(tmp_path)][2:]
        assert found == list(range(1, 21))

    @pytest.mark.parametrize("name", ["jsonl", "tensorboard"])
    def test_a_disk_that_stays_full_is_told_of_at_the_end_too(self, tmp_path, name):
        said = []
        with opened([name], tmp_path, say=said.append) as writers, full(100):
            writers.write(1, {"train/loss": 1.0, "eval/loss": 1.0})
            writers.write(2, {"train/loss": 1.0, "eval/loss": 1.0})
            writers.close()
        assert [line.partition(":")[0] for line in said] == ["warning"] * 2
        assert f"writer {name!r} did not close well, and its last rows may be lost: OSError" in said[1]

    def test_a_writer_that_fails_to_close_does_not_keep_others_open(self):
        recording, said = Recording(), []
        writers = Writers({"good": recording, "bad": Failing()}, said.append)
        writers.close()
        writers.close()
        assert recording.closed == 1
        told = "did not close well, and its last rows may be lost: OSError: not closed either"
        assert said == [f"warning: writer 'bad' {told}"]

    def test_unknown_name(self, tmp_path):
        with pytest.raises(ConfigError, match="'tensorbord'.*did you mean 'tensorboard'"):
            opened(["jsonl", "tensorbord"], tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_importing_telemetry_imports_no_optional_library(self):
        code = (
            "import sys, jaxlm.telemetry.writers, jaxlm.telemetry.progress, jaxlm.telemetry.curves\n"
            "import jaxlm.telemetry.flops\n"
            "print({'tensorboardX', 'wandb', 'matplotlib', 'rich'} & set(sys.modules))"
        )
        assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def events(workdir):
    """All events of all files, in TensorBoard's order: records of (length, crc, event, crc)."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(workdir.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


class TestTensorBoard:
    def test_scalars_are_readable(self, tmp_path, capfd):
        with opened(["tensorboard"], tmp_path) as writers:
            writers.write(1, {"train/loss": 2.5})
            writers.write(2, {"train/loss": math.nan})
        scalars = [
            (event.step, value.tag, value.simple_value) for event in events(tmp_path) for value in event.summary.value
        ]
        assert scalars[0] == (1, "train/loss", 2.5)
        assert scalars[1][:2] == (2, "train/loss") and math.isnan(scalars[1][2])
        assert capfd.readouterr().err == ""

    def test_resume_hides_later_events(self, tmp_path):
        from tensorboardX.proto.event_pb2 import SessionLog

        write(tmp_path, [], 7, ["tensorboard"])
        starts = [event.step for event in events(tmp_path) if event.session_log.status == SessionLog.START]
        assert starts == [8]  # TensorBoard hides what earlier files hold from step 8 on


class TestWandb:
    def test_not_installed(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(ConfigError, match=r"pip install jaxlm\[wandb\]"):
            opened(["jsonl", "wandb"], tmp_path)

    def test_offline(self, tmp_path, monkeypatch):
        wandb = pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_MODE", "offline")
        with opened(["wandb"], tmp_path) as writers:
            assert wandb.run.name == tmp_path.name and wandb.run.project == "jaxlm"
            assert wandb.run.config["optimizer.scale_by_adam.b1"] == 0.9
            first = wandb.run.id
            writers.write(1, {"train/loss": 2.5})
        (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
        deadline = time.monotonic() + 60  # a process of its own writes the file, on a busy machine after `finish`
        while b"train/loss" not in file.read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with opened(["wandb"], tmp_path, 1):
            assert wandb.run.id == first

    def test_it_is_shown_no_secrets(self, tmp_path, monkeypatch):
        wandb = pytest.importorskip("wandb")
        shown = {}
        monkeypatch.setattr(wandb, "init", lambda config, **_: shown.update(config) or MagicMock())
        source = "https://me:canary@example.com/x"
        opened(["wandb"], tmp_path, cfg={"data": {"source": source, "api_key": "canary"}, "steps": 3})
        assert shown == {"data.source": "https://<redacted>@example.com/x", "data.api_key": "<redacted>", "steps": 3}

    def test_a_run_that_went_back_is_logged_again_from_there(self, tmp_path, monkeypatch):
        """W&B takes no step twice by its own count; by a metric it does."""
        wandb = pytest.importorskip("wandb")
        logged, defined = [], []
        run = SimpleNamespace(
            log=logged.append, finish=lambda: None, define_metric=lambda name, **how: defined.append((name, how))
        )
        monkeypatch.setattr(wandb, "init", lambda **_: run)
        write(tmp_path, [1, 2, 3], 0, ["wandb"])
        write(tmp_path, [2, 3], 1, ["wandb"])
        assert logged == [{"train/loss": 1 / step, "step": step} for step in (1, 2, 3, 2, 3)]
        assert defined == 2 * [("step", {}), ("*", {"step_metric": "step"})]

    def test_not_logged_in_is_an_error_and_an_absent_server_a_warning(self, tmp_path, monkeypatch):
        wandb = pytest.importorskip("wandb")
        said = []

        def start(error):
            def init(**_):
                raise error

            monkeypatch.setattr(wandb, "init", init)
            return opened(["jsonl", "wandb"], tmp_path, say=said.append)

        with pytest.raises(ConfigError, match="wandb login"):
            start(wandb.errors.UsageError("no API key"))
        with start(wandb.errors.CommError("timed out")) as writers:
            writers.write(1, {})
        assert said == ["warning: writer 'wandb' is off: CommError: timed out"]
        assert steps(tmp_path) == [1]
