import pytest

from jaxlm import tune
from jaxlm.training import throughput

CONFIG = """
from tests.tiny import tiny
def get_config(arg=""):
    return tiny()
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.mark.slow
def test_a_range_test_from_the_command_line_and_again(config, tmp_path, capsys):
    flags = ["lr", f"--config={config}", f"--workdir={tmp_path / 'lr'}", "--peaks=3", "--seeds=2", "--steps=6"]
    assert tune.main(flags) == 0
    told = capsys.readouterr()
    assert "best after 6 steps: optimizer.scale_by_learning_rate.peak=" in told.out
    assert str(tmp_path / "lr" / "lr.png") in told.out
    assert len(list((tmp_path / "lr" / "trials").iterdir())) == 6
    assert tune.main(flags) == 0
    assert capsys.readouterr().out == told.out


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--low=0", "expected two numbers above 0"),
        ("--peaks=2", "expected at least 3, 1 and 1"),
        ("--field=optimizer.scale_by_adam.b3", "b3"),
        ("--config.optimizer.chain=scale_by_adam,", "has a peak"),
    ],
)
def test_mistakes(config, tmp_path, capsys, flag, told):
    assert tune.main(["lr", f"--config={config}", f"--workdir={tmp_path / 'lr'}", flag]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "flag"),
    [("throughput", "--peaks=3"), ("throughput", "--field=seed"), ("lr", "--again"), ("lr", "--second")],
)
def test_a_flag_of_the_other_command_is_unknown(config, tmp_path, capsys, what, flag):
    assert tune.main([what, f"--config={config}", f"--workdir={tmp_path / 'run'}", flag]) == 2
    assert f"unknown flag '{flag}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "its", "others"),
    [
        ("lr", ("--config", "--workdir", "--peaks", "--field"), "--again"),
        ("throughput", ("--config", "--again"), "--low"),
    ],
)
def test_each_command_explains_its_own_flags(capsys, what, its, others):
    with pytest.raises(SystemExit, match="0"):
        tune.main([what, "--help"])
    told = capsys.readouterr().out
    assert all(f"  {flag} " in told for flag in its) and others not in told
    with pytest.raises(SystemExit, match="0"):
        tune.main(["--help"])
    assert what in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["width"]])
def test_which_command_must_be_said(capsys, flags):
    with pytest.raises(SystemExit, match="2"):
        tune.main(flags)
    assert "lr" in capsys.readouterr().err


@pytest.mark.slow
def test_throughput_from_the_command_line(config, tmp_path, capsys, monkeypatch):
    flags = ["throughput", f"--config={config}", f"--workdir={tmp_path}", "--config.data.batch_size=1"]
    assert tune.main([*flags, "--seconds=0.001"]) == 0
    cut_short = capsys.readouterr().out
    assert "micro_batches" in cut_short and "warning: time ran out before all was tried" in cut_short
    monkeypatch.setattr(throughput, "FIELDS", throughput.FIELDS[:1])  # one way
    assert tune.main(flags) == 0
    first = capsys.readouterr()
    assert "found before" not in first.out and first.err.startswith("data.micro_batches=1")
    assert tune.main(flags) == 0
    second = capsys.readouterr()
    assert "found before" in second.out and not second.err
    assert (tmp_path / "flags.txt").read_text() == "\n"  # the config's own way
    assert tune.main([*flags, "--again"]) == 0
    assert "found before" not in capsys.readouterr().out
    assert tune.main(["throughput", f"--config={config}", f"--workdir={tmp_path}", "--seconds=-1"]) == 2
    assert "--seconds=-1; expected more than 0" in capsys.readouterr().err
