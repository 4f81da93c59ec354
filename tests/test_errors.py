import os
import subprocess
import sys

import pytest

from jaxlm.errors import ConfigError, DataError, DivergedError, JaxlmError, closest, exit_code, nearest


def fail(error):
    def door():
        raise error

    return door


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("steps is -1"), 2, "error: steps is -1\n"),
        (DivergedError("loss is nan"), 3, "error: loss is nan\n"),
        (DataError("no such corpus"), 4, "error: no such corpus\n"),
        (FileNotFoundError(2, "No such file", "x.txt"), 4, "error: [Errno 2] No such file: 'x.txt'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_a_mishap_is_one_line_and_its_exit_code(error, code, said, capsys):
    assert exit_code(fail(error)) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", said)


def test_a_door_that_returns_keeps_its_code(capsys):
    assert exit_code(lambda: 75) == 75
    assert capsys.readouterr() == ("", "")


def test_a_bug_is_not_dressed_up_as_the_users_mistake():
    with pytest.raises(ZeroDivisionError):
        exit_code(fail(ZeroDivisionError()))


def test_every_error_of_ours_is_a_jaxlm_error_with_a_code_of_its_own():
    kinds = [ConfigError, DivergedError, DataError]
    assert all(issubclass(kind, JaxlmError) for kind in kinds)
    assert len({kind.exit_code for kind in [JaxlmError, *kinds]}) == 4


def test_the_nearest_name_is_offered():
    assert nearest("setps", ["seed", "steps", "stage"]) == "did you mean 'steps'?"


def test_all_names_are_offered_where_none_is_near():
    assert nearest("zzz", ["b", "a"]) == "known: a, b"
    assert nearest("zzz", []) == "there are none"


def test_the_closest_name_is_one_that_is_near():
    assert closest("setps", ["seed", "steps", "stage"]) == "steps"
    assert closest("zzz", ["b", "a"]) is None and closest("zzz", []) is None


def test_of_many_names_the_first_are_offered():
    names = [f"name{i:05}" for i in range(14683)]
    assert nearest("zzz", names[:20]) == "known: " + ", ".join(names[:20])
    assert nearest("zzz", names) == "known: " + ", ".join(names[:20]) + ", ... (14,683 in all)"


def test_a_reader_that_has_enough_is_no_error():
    code = "import sys; from jaxlm import errors; sys.exit(errors.exit_code(lambda: print(('x' * 99 + '\\n') * 9999)))"
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$0" -c "$1" | head -1', sys.executable, code], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (141, "x" * 99 + "\n", "")


DOORS = """
import sys
from jaxlm import errors
def fails():
    print("\u00e9", sys.stderr.isatty(), file=sys.stdout)
    raise errors.DataError("no such corpus")
sys.exit(errors.exit_code(fails))
"""


@pytest.mark.parametrize("how", [">&-", "2>&-", ">&- 2>&-", "2>/dev/full", "2>&1 >/dev/null | true"])
def test_streams_that_are_closed_or_broken_change_no_exit_code(how):
    command = ["bash", "-c", f'set -o pipefail; "$0" -c "$1" {how}', sys.executable, DOORS]
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # which .ci/run sets
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=usual)
    assert done.returncode == 4 and done.stderr in ("", "error: no such corpus\n")


def test_what_stdout_can_t_encode_is_a_question_mark():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", DOORS], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (4, "? False\n")
