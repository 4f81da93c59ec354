"""A run, and a study, know an edited function from the one that they trained with."""

import fractions
import functools
import os
import subprocess
import sys
import textwrap
import types
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from ml_collections import FrozenConfigDict

from jaxlm import functions
from tests.runs import ROOT


def digest(function):
    return functions.digest(FrozenConfigDict({"optimizer": {"mine": {"transform": function}}}))


def defined(text, name="mine", **variables):
    """What a file with this text defines."""
    module = {"__name__": "my_module", "optax": optax, **variables}
    exec(textwrap.dedent(text), module)
    return module[name]


MINE = """
    SCALE = 0.5

    def scaled(x):
        return x * SCALE

    class Step:
        def take(self, x):
            return x - 1

    def mine(power=2):
        def update(updates, state, params=None):
            return scaled(updates) ** power + Step().take(updates), state
        return optax.GradientTransformation(lambda params: (), update)
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("** power", "* power"),
        ("SCALE = 0.5", "SCALE = 0.25"),
        ("x * SCALE", "x / SCALE"),
        ("power=2", "power=3"),
        ("x - 1", "x - 2"),
    ],
    ids=["its body", "a value of its module", "a function that it calls", "a default", "a class that it uses"],
)
def test_an_edit_is_seen(old, new):
    assert old in MINE
    assert digest(defined(MINE)) == digest(defined(MINE))
    assert digest(defined(MINE)) != digest(defined(MINE.replace(old, new)))
    assert digest(defined(MINE)()) != digest(defined(MINE.replace(old, new))())  # of what the function returned, too


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ([1, 2], [1, 3]),
        ({"a": 1}, {"a": 2}),
        ({"a"}, {"b"}),
        (([1],), ([2],)),
        (np.arange(3), np.arange(3) + 1),
        (np.float32(1), np.float32(2)),
        (functools.partial(pow, 2), functools.partial(pow, 3)),
    ],
)
def test_an_edit_of_a_value_of_its_module_is_seen(old, new):
    text = "def mine(x):\n    return TABLE, x"
    assert digest(defined(text, TABLE=old)) == digest(defined(text, TABLE=old)) != digest(defined(text, TABLE=new))


def test_an_edit_in_another_module_of_the_user_s_is_seen():
    def mine(helper, other="1"):
        package, helpers = types.ModuleType("my_package"), types.ModuleType("my_package.helpers")
        exec(f"import my_package\ndef f(x):\n    return {helper}\ndef g(x):\n    return {other}", vars(helpers))
        package.my_package, package.helpers = package, helpers  # as `import my_package.helpers` in its __init__.py
        return defined("def mine(x):\n    return my_package.helpers.f(x)", my_package=package)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "my_package", types.ModuleType("my_package"))
        assert digest(mine("x")) == digest(mine("x")) != digest(mine("1 - x"))
        assert digest(mine("x")) == digest(mine("x", other="2"))  # which it does not name


def test_what_changes_nothing_is_not_an_edit():
    noted = MINE.replace("    SCALE = 0.5\n", "    # Half of it.\n\n    SCALE = 0.5\n    OTHER = 3\n")
    assert digest(defined(MINE)) == digest(defined(noted + "\n    def another():\n        return OTHER\n"))


def made(value):
    def update(updates, state, params=None):
        return jax.tree.map(lambda x: x * value, updates), state

    return optax.GradientTransformation(lambda params: (), update)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (made(0.1), made(0.2)),
        (made(np.arange(3)), made(np.arange(3) + 1)),
        (made({"a": [1, 2]}), made({"a": [1, 3]})),
        (made({"a", "b"}), made({"a", "c"})),
        (made(SimpleNamespace), made(fractions.Fraction)),
        (optax.scale(0.1), optax.scale(0.2)),
        (functools.partial(made, 0.1), functools.partial(made, 0.2)),
        (jax.jit(lambda x: x + 1), jax.jit(lambda x: x + 2)),
        (optax.adam(0.1, b1=0.8), optax.adam(0.1, b1=0.9)),
        (optax.chain(optax.scale(1.0), made(0.1)), optax.chain(optax.scale(1.0), made(0.2))),
    ],
)
def test_the_variables_that_a_function_closes_over_count(one, other):
    assert digest(one) == digest(one) != digest(other)


def test_a_function_that_names_itself_ends():
    recursive = "def mine(n=3):\n    return mine(n - 1) if n else optax.identity()\n"
    assert digest(defined(recursive)) == digest(defined(recursive)) != digest(defined(recursive.replace("3", "4")))


def test_functions_that_are_named_count_wherever_they_stand(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "named_in_configs.py").write_text("def mine():\n    return 1\n")
    name = "named_in_configs:mine"
    places = (
        {"transform": name},
        {"data": {"source": name}},
        {"tasks": (name,)},
        {"schedule": {"parts": ("linear", name)}},
    )
    found = [functions.digest(FrozenConfigDict(place)) for place in places]
    assert all(found) and len(set(found)) == len(found)


def test_a_config_without_functions_has_no_code():
    cfg = {"tokenizer": "bpe:large", "source": "hf://name", "transform": "optax.contrib:adopt", "steps": 3, "x": None}
    assert functions.digest(FrozenConfigDict(cfg)) == ""


def test_another_process_finds_the_same():
    script = "from tests.test_functions import MINE, defined, digest, made; "
    script += "print(digest(defined(MINE)), digest(made({'a', 'b', 'c'})))"
    for seed in "1", "2":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == [digest(defined(MINE)), digest(made({"a", "b", "c"}))]
