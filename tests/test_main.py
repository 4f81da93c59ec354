import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm import main
from jaxlm.errors import ConfigError
from tests.tiny import CORPUS

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "quickstart.py")
TINY = [
    "--config.steps=4",
    "--config.model.num_layers=1",
    "--config.model.num_heads=2",
    "--config.model.embed_dim=16",
    "--config.model.context_length=16",
    "--config.data.batch_size=4",
    f"--config.data.source={CORPUS}",
    "--config.eval.batches=1",
    "--config.log.writers=jsonl,",
]


def call(*flags, config=CONFIG, workdir=None):
    return main.main([f"--config={config}", *([f"--workdir={workdir}"] if workdir else []), *TINY, *flags])


def test_overrides_are_read_with_equals_or_space():
    assert main.overrides(["--config.a.b=1", "--config.c", "x=y", "--config.d="]) == {"a.b": "1", "c": "x=y", "d": ""}
    for wrong in (["--confg.a=1"], ["steps=1"], ["--config.a"], ["--config=x"]):
        with pytest.raises(ConfigError):
            main.overrides(wrong)


def test_the_default_run_directory_is_named_after_config_and_argument():
    assert main.name("configs/shakespeare_char.py:cpu") == "shakespeare_char-cpu"
    assert main.name("x.py") == "x"
    assert main.name("x.py:../../etc") == "x-..-..-etc"


def test_a_run_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "jaxlm.main", f"--config={CONFIG}", *TINY]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "runs/quickstart/status.json").read_text())["status"] == "done"
    assert "eval" in done.stderr and "Traceback" not in done.stderr and "Warning" not in done.stderr


def test_explain_prints_and_trains_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("--explain") == 0
    told = capsys.readouterr().out
    for part in ("steps = 4", "h/attn/c_attn/kernel", "[1, 16, 48]", "add_decayed_weights", "learning rate", "FLOPs"):
        assert part in told
    assert [path.name for path in tmp_path.glob("runs/*/*")] == ["schedule.png"]


def test_a_run_directory_may_lie_in_the_home(tmp_path, monkeypatch):
    """No shell makes a folder of the "~" in --workdir=~/x."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert call("--explain", "--workdir=~/x") == 0
    assert (tmp_path / "home/x/schedule.png").exists() and not (tmp_path / "~").exists()


BAD = {
    "unknown field": (["--config.model.num_layer=3"], 2, "did you mean 'model.num_layers'?"),
    "unknown section": (["--config.modle.num_layers=3"], 2, "did you mean 'model.num_layers'?"),
    "wrong type": (["--config.steps=many"], 2, "steps is 'many' (str); expected int"),
    "fraction for an int": (["--config.steps=1.5"], 2, "steps is 1.5 (float); expected int"),
    "bool for an int": (["--config.steps=True"], 2, "steps is True (bool); expected int"),
    "negative steps": (["--config.steps=-5"], 2, "steps is -5; expected from 1 to 2**31 - 1"),
    "too many steps": (["--config.steps=2147483648"], 2, "steps is 2147483648; expected from 1 to 2**31 - 1"),
    "heads": (["--config.model.num_heads=3"], 2, "model.num_heads=3 does not divide model.embed_dim=16"),
    "nan rate": (["--config.optimizer.scale_by_learning_rate.peak=nan"], 2, "peak is nan; expected a finite number"),
    "dropout": (["--config.model.dropout=1.0"], 2, "model.dropout is 1.0; expected at least 0 and below 1"),
    "stage": (["--config.optimizer.chain=scale_by_adm,scale_by_learning_rate"], 2, "did you mean 'scale_by_adam'?"),
    "argument": (["--config.optimizer.scale_by_adam.bb1=0.9"], 2, "takes no argument 'bb1': did you mean 'b1'?"),
    "schedule": (["--config.optimizer.scale_by_learning_rate.schedule=cosin"], 2, "unknown schedule 'cosin'"),
    "mask": (["--config.optimizer.add_decayed_weights.where=kernal"], 2, "matches no parameter"),
    "flag": (["--steps=3"], 2, "unknown flag '--steps=3'"),
    "missing file": (["--config.data.source=no/such.txt"], 4, "no/such.txt"),
    "tokenizer": (["--config.data.tokenizer=byte"], 2, "bytes"),
    "context": (["--config.model.context_length=10000000"], 4, "shorter than one window"),
    "micro-batches": (["--config.data.micro_batches=3"], 2, "does not divide data.batch_size=4"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error_and_its_exit_code(case, tmp_path, capsys):
    flags, code, message = BAD[case]
    assert call(*flags, workdir=tmp_path / "run") == code
    told = capsys.readouterr().err
    last = told.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in told and "Traceback" not in told
    assert len(told) < 1500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"abc \xff def", "position 4"),
        (b"short", "shorter than one window"),
    ],
)
def test_bad_text_is_a_data_error(content, message, tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes(content)
    flags = [f"--config.data.source={tmp_path / 'text.txt'}", "--config.data.validation="]
    assert call(*flags, workdir=tmp_path / "run") == 4
    assert message in capsys.readouterr().err


def test_text_with_bad_bytes_trains_when_asked_to_replace_them(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"abc \xff def\n" * 50)
    flags = [f"--config.data.source={tmp_path / 'text.txt'}", "--config.data.errors=replace"]
    assert call(*flags, workdir=tmp_path / "run") == 0


def test_a_config_file_that_is_not_there_or_broken(tmp_path, capsys):
    assert call(config="configs/quikstart.py") == 2
    assert "did you mean 'configs/quickstart.py'?" in capsys.readouterr().err
    (tmp_path / "c.py").write_text(
        "from jaxlm import config\ndef get_config(arg=''):\n    c = config.default()\n    c.stpes = 3\n"
    )
    assert call(config=tmp_path / "c.py") == 2
    assert "line 4: unknown config field 'stpes': did you mean 'steps'?" in capsys.readouterr().err


def test_without_a_config_usage_is_shown(capsys):
    with pytest.raises(SystemExit) as error:
        main.main([])
    assert error.value.code == 2
    assert "--config" in capsys.readouterr().err
