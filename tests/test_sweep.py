import os
import shlex
import subprocess
import sys

import pytest

from jaxlm import sweep
from tests.runs import ROOT

STUDY = """
from tests.ablation.small import small
def study():
    return small(steps=4, seeds=(0,))
"""


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "007_small.py"
    path.write_text(STUDY)
    return path


def test_a_study_from_the_command_line(experiment, tmp_path):
    flags = [f"--experiment={experiment}", "--workdir=runs/my study"]
    command = [sys.executable, "-m", "jaxlm.sweep", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "runs/my study/report.md").read_text()
    assert "Does clipping matter?" in report and "nothing can be concluded" in report
    assert shlex.join(["python", "-m", "jaxlm.sweep", *flags]) in report
    assert "one seed: nothing can be concluded" in done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr


def test_dry_run_tells_the_plan_and_trains_nothing(experiment, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sweep.main([f"--experiment={experiment}", "--dry_run"]) == 0
    told = capsys.readouterr().out
    for part in ("Does clipping matter?", "no clip", "256 training tokens a trial", "3 trials in 2 programs", "FLOPs"):
        assert part in told
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def study():\n    return 3\n", "expected a jaxlm.ablation.Study"),
        ("", "defines no study()"),
        (STUDY.replace("seeds=(0,)", "baseline='clop'"), "did you mean 'clip'?"),
        (STUDY.replace("seeds=(0,)", "variants={'clip': {}, 'x': {'model.dropuot': 0.1}}"), "'model.dropout'?"),
        (STUDY.replace("seeds=(0,)", "metric='eval/los'"), "did you mean 'eval/loss'?"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, capsys, text, told):
    path = tmp_path / "study.py"
    path.write_text(text)
    assert sweep.main([f"--experiment={path}", f"--workdir={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and told in error


def test_no_such_experiment(capsys):
    assert sweep.main(["--experiment=experiments/003_optimiser.py"]) == 2
    assert "no experiment file" in (error := capsys.readouterr().err) and "003_optimizers.py" in error


def test_an_address_is_of_a_cluster(experiment, capsys):
    assert sweep.main([f"--experiment={experiment}", "--address=auto"]) == 2
    assert "--executor=ray" in capsys.readouterr().err
