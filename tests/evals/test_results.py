"""What tasks give, as plain numbers, under names that no two share, and as JSON."""

import json

import pytest

import jaxlm
from jaxlm.errors import ConfigError
from jaxlm.evals import asking, results, tasks
from tests.tiny import tiny


def test_a_task_may_give_numbers_of_numpy_and_jax(tmp_path, monkeypatch):
    (tmp_path / "scalars.py").write_text(
        "import jax.numpy as jnp\nimport numpy as np\nfrom jaxlm.evals.tasks import Result\n"
        "def good(s):\n    return {'a': np.float32(0.5), 'b': jnp.float32(2), 'c': np.int64(3)}\n"
        "def whole(s):\n    return Result({'a': np.float32(0.5)}, {})\n"
        "def text(s):\n    return {'a': 1, 'b': '2'}\n"
        "def many(s):\n    return {'a': np.ones(1)}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = asking.find("scalars:good")(None)
    assert found == tasks.Result({"a": 0.5, "b": 2.0, "c": 3.0}, {})
    assert {type(value) for value in found.metrics.values()} == {float}
    assert json.loads(results.report({}, {"scalars:whole": asking.find("scalars:whole")(None)}, True))["eval/a"] == 0.5
    with pytest.raises(ConfigError, match="task 'scalars:text' gives str as 'b'; expected a number"):
        asking.find("scalars:text")(None)
    with pytest.raises(ConfigError, match="task 'scalars:many' gives ndarray as 'a'; expected a number"):
        asking.find("scalars:many")(None)


def test_what_a_task_gives_is_of_python_s_own_kinds(tmp_path, monkeypatch):
    """NumPy's numbers once were a traceback, after all was done."""
    (tmp_path / "kinds.py").write_text(
        "import jax.numpy as jnp\nimport numpy as np\nfrom jaxlm.evals.tasks import Result\n"
        "def good(s):\n"
        "    details = {'n': np.int64(3), np.int64(4): [np.arange(3), {'x': jnp.float32(0.5)}], 't': (np.nan, None)}\n"
        "    return Result({'a': 1.0}, {'a': (np.float32(0), jnp.float32(2))}, details)\n"
        "def no_text(s):\n    return Result({'a': 1.0}, {}, None, None)\n"
        "def no_intervals(s):\n    return Result({'a': 1.0}, None)\n"
        "def no_json(s):\n    return Result({'a': 1.0}, {}, {'it': object()})\n"
        "def one_end(s):\n    return Result({'a': 1.0}, {'a': 3})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = {"kinds:good": asking.find("kinds:good")(None)}
    said = json.loads(results.report({}, found, as_json=True))
    assert said["intervals"] == {"eval/a": [0.0, 2.0]}
    assert said["details"]["kinds:good"] == {"n": 3, "4": [[0, 1, 2], {"x": 0.5}], "t": ["nan", None]}
    assert results.report({}, found, as_json=False).split() == ["eval/a", "1.0000", "[0.0000,", "2.0000]"]
    for name, message in {
        "no_text": "task 'kinds:no_text' gives NoneType as its text; expected lines, or ''",
        "no_intervals": "task 'kinds:no_intervals' gives NoneType as its intervals; expected a dict",
        "no_json": "task 'kinds:no_json' gives details that JSON can't hold: .*object",
        "one_end": r"task 'kinds:one_end' gives 3 as the interval of 'a'; expected two numbers, \(low, high\)",
    }.items():
        with pytest.raises(ConfigError, match=message):
            asking.find(f"kinds:{name}")(None)


@pytest.mark.slow
def test_a_task_overwrites_no_other_metric(tmp_path, monkeypatch):
    one, other = tasks.Result({"score": 1.0}, {}), tasks.Result({"score": 2.0}, {})
    with pytest.raises(ConfigError, match="task 'b:it' gives 'score', and 'eval/score' is of task 'a:it' already"):
        results.report({}, {"a:it": one, "b:it": other}, as_json=True)
    taken = {"b:it": tasks.Result({"accuracy": 2.0}, {})}
    message = "'eval/accuracy' is of jaxlm itself already; give it another name, such as 'it/accuracy'"
    with pytest.raises(ConfigError, match=message):
        results.report({"eval/accuracy": 0.5}, taken, as_json=True)
    (tmp_path / "taking.py").write_text("def it(s):\n    return {'accuracy': 2}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=message):
        jaxlm.train(tiny(eval__tasks=("taking:it",)), tmp_path / "run")
    (tmp_path / "mean_task.py").write_text("def it(s):\n    return {'ema_loss': 2}\n")
    average = {"optimizer__ema_of_params": {"decay": 0.9}}
    chain = ("scale_by_adam", "scale_by_learning_rate", "ema_of_params")
    with pytest.raises(ConfigError, match="'eval/ema_loss' is of jaxlm itself already"):
        jaxlm.train(tiny(eval__tasks=("mean_task:it",), optimizer__chain=chain, **average), tmp_path / "average")


def test_json_has_no_bare_nan():
    nan, inf = float("nan"), float("inf")
    found = {"classify": tasks.Result({"classify/accuracy": nan}, {"classify/accuracy": (-inf, 1.0)}, [{"a": nan}])}
    said = json.loads(results.report({"step": 3, "eval/loss": inf}, found, as_json=True), parse_constant=pytest.fail)
    assert said == {
        "step": 3,
        "eval/loss": "inf",
        "eval/classify/accuracy": "nan",
        "intervals": {"eval/classify/accuracy": ["-inf", 1.0]},
        "details": {"classify": [{"a": "nan"}]},
    }
