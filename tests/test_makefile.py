"""How `make` makes an environment for a Python without ensurepip, as Debian's is. Needs make and fetches nothing."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("make", "rm", "mkdir", "touch")
BUNDLED = (Path(sysconfig.get_path("stdlib")) / "ensurepip" / "_bundled", Path("/usr/share/python-wheels"))

# Its pip, where it has one, does what `pip --python` does with a network: install a pip into that environment.
BARE_PYTHON = """#!/bin/sh
case "$*" in
"-c import ensurepip"* | "-m virtualenv"*) exit 1 ;;
"-m pip"*) [ {has_pip} = True ] || exit 1 ;;
esac
case "$*" in
"-m pip --version") exit 0 ;;
"-m pip --python"*) exec "$4" "{wheel}/pip" install -qq --no-index "{wheel}" ;;
esac
exec "{python}" "$@"
"""


@pytest.fixture
def made(tmp_path):
    """A function that runs `make`, up to the empty environment, and returns the process and that folder."""
    if not all(map(shutil.which, TOOLS)):
        pytest.skip(f"needs {', '.join(TOOLS)}")
    wheel = next((wheel for folder in BUNDLED for wheel in folder.glob("pip-*.whl")), None)
    if wheel is None:
        pytest.skip("needs the wheel of pip that comes with Python or Debian")
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:  # nothing else: there may be a virtualenv on PATH
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    environ = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}

    def run(has_pip=False, wheels=False):
        python, venv = tmp_path / "python", tmp_path / "venv"
        python.write_text(BARE_PYTHON.format(has_pip=has_pip, wheel=wheel, python=sys._base_executable))
        python.chmod(0o755)
        folder = wheel.parent if wheels else tmp_path / "no-wheels"
        command = ["make", f"PYTHON={python}", f"VENV={venv}", f"wheels={folder}", f"{venv}/.made"]
        environment = environ | {"PATH": str(tmp_path / "bin"), "PIP_NO_COMPILE": "1"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True), venv

    return run


@pytest.mark.parametrize("way", ["has_pip", "wheels"])
def test_without_ensurepip_a_pip_that_is_there_serves(made, way):
    process, venv = made(**{way: True})
    assert process.returncode == 0, process.stderr
    subprocess.run([venv / "bin" / "python", "-m", "pip", "--version"], check=True, capture_output=True)


def test_without_any_pip_it_says_what_to_install_and_leaves_nothing(made):
    process, venv = made()
    assert process.returncode != 0
    assert "python3-venv" in process.stderr and "python3-pip" in process.stderr
    assert not venv.exists()


def test_an_environment_is_kept_if_it_was_made_to_its_end(made):
    _, venv = made(has_pip=True)
    assert not (venv / ".half").exists()
    (venv / ".made").unlink()
    process, _ = made()
    assert (process.returncode, process.stdout) == (0, "") and (venv / ".made").exists()
    (venv / ".made").unlink()
    (venv / ".half").touch()
    process, _ = made()
    assert f"making {venv}" in process.stdout and not venv.exists()
