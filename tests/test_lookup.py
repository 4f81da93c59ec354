import optax
import optax.contrib
import pytest

from jaxlm.errors import PREEMPTED, ConfigError, DataError
from jaxlm.lookup import calling, find, takes
from jaxlm.optim import schedules, transforms


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of the user's own; each under a name of its own, since imports are kept."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source)

    return write


def test_the_first_module_that_has_a_name_wins():
    modules = (transforms, optax, optax.contrib)
    assert find("transform", "scale_by_learning_rate", *modules) is transforms.scale_by_learning_rate
    assert find("transform", "scale_by_learning_rate", *reversed(modules)) is optax.scale_by_learning_rate


@pytest.mark.parametrize("name", ["scale_by_adam", "muon"])
def test_later_modules_are_searched(name):
    assert find("transform", name, transforms, optax, optax.contrib).__name__ == name


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown schedule 'warmup_cosin': did you mean 'warmup_cosine'"):
        find("schedule", "warmup_cosin", schedules)


def test_a_name_like_no_other_names_where_to_look():
    with pytest.raises(ConfigError, match=r"'zzzz': see jaxlm.optim.transforms, optax, or name a package.module:func"):
        find("transform", "zzzz", transforms, optax)


@pytest.mark.parametrize("name", ["Shape", "jnp", "_after_warmup", "annotations", ""])
def test_what_is_no_public_function_is_unknown(name):
    with pytest.raises(ConfigError, match=f"unknown schedule {name!r}"):
        find("schedule", name, schedules)


def test_a_function_of_the_users_own_is_imported(module):
    module("jaxlm_test_own", "def halve():\n    return 0.5\n")
    assert find("transform", "jaxlm_test_own:halve", transforms)() == 0.5


def test_a_misspelt_function_of_the_users_own_names_the_nearest(module):
    module("jaxlm_test_typo", "def halve():\n    return 0.5\n")
    with pytest.raises(ConfigError, match="'jaxlm_test_typo' has no function 'halv': did you mean 'halve'"):
        find("transform", "jaxlm_test_typo:halv", transforms)


@pytest.mark.parametrize(
    ("name", "source", "said"),
    [
        ("broken", "x = 1 / 0\n", "ZeroDivisionError: division by zero"),
        ("syntax", "x = = 1\n", "SyntaxError: invalid syntax"),
        ("nested", "import jaxlm_test_nothing\n", "ModuleNotFoundError: No module named 'jaxlm_test_nothing'"),
    ],
)
def test_a_module_that_fails_to_import_keeps_the_last_line(module, name, source, said):
    module(f"jaxlm_test_{name}", source)
    with pytest.raises(ConfigError, match=f"importing 'jaxlm_test_{name}' failed: {said}") as caught:
        find("transform", f"jaxlm_test_{name}:f")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["jaxlm_test_absent:f", ":f"])
def test_a_module_that_is_not_there_is_an_error(name):
    with pytest.raises(ConfigError, match=f"transform {name!r}: importing .* failed: "):
        find("transform", name)


OWN = """
import os, sys
def divides(subject):
    return 1 // 0
def reads(subject):
    return open("/no/such/file")
def leaves(subject):
    sys.exit()
def two(a, b): ...
"""


def test_what_a_function_of_the_users_own_raises_names_it_and_its_line(module, tmp_path):
    module("jaxlm_test_raising", OWN)
    for name, kind, said in (
        ("divides", ConfigError, rf"{tmp_path}/jaxlm_test_raising.py, line 4: ZeroDivisionError: "),
        ("reads", DataError, r"line 6: FileNotFoundError: .*/no/such/file"),
        ("leaves", ConfigError, "line 8: SystemExit"),
    ):
        function = find("task", f"jaxlm_test_raising:{name}")
        with pytest.raises(kind, match=f"^task 'jaxlm_test_raising:{name}': .*{said}"):
            with calling("task", f"jaxlm_test_raising:{name}", function):
                function(None)


@pytest.mark.parametrize("error", [MemoryError(), SystemExit(PREEMPTED), KeyboardInterrupt(), DataError("no rows")])
def test_what_is_no_fault_of_the_function_passes(error):
    with pytest.raises(type(error)) as caught, calling("task", "a:b", len):
        raise error
    assert caught.value is error


def test_a_bug_in_one_of_ours_stays_one():
    with pytest.raises(ZeroDivisionError), calling("task", "generate", len):
        _ = 1 // 0


def test_a_function_that_can_t_be_given_its_arguments_is_refused_before_it_is_called(module):
    module("jaxlm_test_two", OWN)
    takes("task", "x:y", find("task", "jaxlm_test_two:divides"), "subject")
    takes("task", "x:y", max, "subject")  # no one knows what that takes
    with pytest.raises(ConfigError, match=r"task 'x:y' is called with \(subject\): missing a required argument: 'b'"):
        takes("task", "x:y", find("task", "jaxlm_test_two:two"), "subject")
