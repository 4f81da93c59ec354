import json
import math
import shutil
import subprocess
import tempfile

import jax.numpy as jnp
import pytest

import jaxlm
from jaxlm import main
from jaxlm.errors import ConfigError
from jaxlm.training import verify
from tests.tiny import CORPUS, tiny

CONFIG = """
from tests.tiny import tiny


def get_config(arg=""):
    return tiny(model__dropout=0.1)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_ends_with_the_same_bits(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # programs as users have them
    (tmp_path / "c.py").write_text(CONFIG)
    assert main.main([f"--config={tmp_path / 'c.py'}", "--verify_resume=12"]) == 0
    assert "12 steps, killed at about steps 3, 6, 9: the same batches, metrics and bits" in capfd.readouterr().out


@pytest.mark.parametrize(("code", "given"), [(2, 2), (3, 3), (4, 4), (-9, 137)])
def test_a_run_that_fails_gives_its_own_exit_code_and_leaves_nothing(tmp_path, monkeypatch, capsys, code, given):
    (tmp_path / "c.py").write_text(CONFIG)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(verify, "_run", lambda cfg, workdir: code)
    assert main.main([f"--config={tmp_path / 'c.py'}", "--verify_resume=12"]) == given
    assert capsys.readouterr().err == f"error: the undisturbed run ended with exit code {code}; see above\n"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() and path.name != "__pycache__"] == []


def test_an_interrupt_ends_the_run_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    started, Popen = [], subprocess.Popen

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: started.append(Popen(*args, **more)) or started[-1])
    monkeypatch.setattr(verify, "_last_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        verify.verify_resume(tiny(), 12)
    assert started[0].returncode == -9 and list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("straight", "killed"):
        jaxlm.train(verify.shortened(tiny(data__source=str(CORPUS)), 6), folder / name)
        (folder / name / "batches.jsonl").write_text('[0, "a"]\n[4, "b"]\n')
    return folder / "straight", folder / "killed"


def differences(two_runs):
    return [line for compare in (verify._batches, verify._metrics, verify._state) for line in compare(*two_runs)]


def test_equal_runs_have_no_difference(two_runs):
    assert differences(two_runs) == []


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('[4, "c"]', "sequence 4 is another one in the killed run"),
        ('[8, "b"]', "sequence 8 is another one in the killed run"),
    ],
)
def test_another_sequence_shows(two_runs, line, told):
    file = two_runs[1] / "batches.jsonl"
    before = file.read_text()
    file.write_text(before + line + "\n[0,")
    try:
        assert differences(two_runs) == [told]
        file.write_text(before.splitlines()[0])
        assert differences(two_runs) == ["the killed run never saw sequence 4"]
    finally:
        file.write_text(before)


def test_another_metric_shows(two_runs):
    file = two_runs[1] / "metrics.jsonl"
    before = file.read_text()
    changed = [json.loads(line) for line in before.splitlines()]
    changed[1]["train/loss"] += 1e-7
    changed[1]["time"] = 0
    file.write_text("".join(json.dumps(row) + "\n" for row in changed[:-1]))
    try:
        first, second = differences(two_runs)
        assert first.startswith("train/loss of step 2 is ") and second.startswith("metrics.jsonl has ")
    finally:
        file.write_text(before)


def test_another_bit_of_the_state_shows(tmp_path, two_runs, monkeypatch):
    other = tmp_path / "other"
    cfg = verify.shortened(tiny(data__source=str(CORPUS)), 6)
    monkeypatch.setattr("optax.apply_updates", lambda params, _: params)
    jaxlm.train(cfg, other)
    found = list(verify._state(two_runs[0], other))
    assert any(line.startswith("params/wte/embedding differs in ") for line in found)
    assert not any(line.startswith(("step", "key")) for line in found)


def test_what_another_process_can_not_be_given_is_refused():
    cfg = tiny(optimizer__chain=("mine", "scale_by_learning_rate"))
    cfg.optimizer["mine"] = {"transform": lambda: jnp.float32(0)}
    with pytest.raises(ConfigError, match="optimizer.mine.transform is a Python object"):
        verify.shortened(cfg, 20)
    with pytest.raises(ConfigError, match="--verify_resume=3: a run that is to be killed 3 times takes more steps"):
        verify.shortened(tiny(), 3)


def test_the_steps_of_a_branch_are_counted_from_where_it_leaves_its_source(trained, tmp_path, monkeypatch):
    """And of kills before the first save of its own nothing is told."""
    branch = tiny(init_from=str(trained), init_state=True, checkpoint__keep=9)
    jaxlm.train(verify.shortened(branch, 6), tmp_path / "run")
    (tmp_path / "run" / "batches.jsonl").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    saves = False

    def run(cfg, workdir, until=math.inf):
        assert cfg.steps == 46
        kept = "" if until == math.inf else f"checkpoints/{until}"
        if saves or not kept:
            shutil.copytree(tmp_path / "run" / kept, workdir / kept, dirs_exist_ok=True)
        return 0

    monkeypatch.setattr(verify, "_run", run)
    with pytest.raises(ConfigError, match="--verify_resume=6: no killed run had saved a step to go on from; give more"):
        verify.verify_resume(branch, 6)
    saves = True
    line = "6 steps after step 40, killed at about steps 41, 43, 44: the same batches, metrics and bits"
    assert verify.verify_resume(branch, 6) == line
