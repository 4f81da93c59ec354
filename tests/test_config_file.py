import re
import sys
from pathlib import Path

import pytest

from jaxlm import config, config_file
from jaxlm.errors import ConfigError
from jaxlm.optim.stages import stages

ROOT = Path(__file__).parents[1]


def write(folder, source, name="x.py"):
    path = folder / name
    path.write_text(source)
    return str(path)


GOOD = "from jaxlm import config\n\n\ndef get_config(arg=''):\n    c = config.default()\n"


def test_a_config_file_is_given_its_argument(tmp_path):
    file = write(tmp_path, GOOD + "    c.data.source = arg or 'stdlib'\n    return c\n")
    assert config_file.load(file).data.source == "stdlib"
    assert config_file.load(file + ":a:b.txt").data.source == "a:b.txt"


DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass
from jaxlm import config, config_file
@dataclass
class Plan:
    steps: int = STEPS
def get_config(arg=""):
    c = config_file.load(arg) if arg else config.default()
    @dataclass
    class Own(Plan):
        half: int = 0
    c.steps, c.seed = Own().steps, c.steps
    return c
"""


def test_a_config_file_may_hold_dataclasses(tmp_path):
    before = set(sys.modules)
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other", DATACLASS.replace("STEPS", "5"))
    cfg = config_file.load(write(tmp_path, DATACLASS.replace("STEPS", "7")) + f":{other}")
    assert (cfg.steps, cfg.seed) == (7, 5)
    assert not [name for name in set(sys.modules) - before if "jaxlm_config" in name]


def test_a_missing_config_file_names_the_nearest(tmp_path):
    near = write(tmp_path, GOOD, "shakespeare.py")
    with pytest.raises(ConfigError, match=re.escape(f"did you mean {near!r}")):
        config_file.load(str(tmp_path / "shakespear.py"))


def test_a_missing_config_folder_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no config file"):
        config_file.load(str(tmp_path / "nowhere" / "x.py"))
    with pytest.raises(ConfigError, match="no config file '.*/x.py': there are none$"):
        config_file.load(str(tmp_path / "x.py"))


def test_a_folder_in_the_place_of_a_config_file_is_said_to_be_one(tmp_path):
    write(tmp_path, GOOD)
    with pytest.raises(ConfigError, match=re.escape(f"no config file {str(tmp_path)!r}: it is a folder; ") + ".*x.py"):
        config_file.load(str(tmp_path))


def test_what_is_no_python_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a Python file"):
        config_file.load(write(tmp_path, "{}", "x.json"))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (GOOD + "    return c c\n", ", line 6: SyntaxError: invalid syntax"),
        (GOOD + "    c.modle.x = 3\n    return c\n", ", line 6: unknown config field 'modle': did you mean 'model'"),
        (
            GOOD + "    c.model.num_layer = 3\n    return c\n",
            ", line 6: unknown config field 'num_layer': did you mean 'num",
        ),
        (GOOD + "    return c.zzz\n", ", line 6: unknown config field 'zzz': known: "),
        (GOOD + "    c.steps = 'many'\n    return c\n", ", line 6: TypeError: "),
        (GOOD + "    return cc\n", ", line 6: NameError: name 'cc' is not defined"),
        (
            GOOD + "    c = None\n    c.steps = 3\n",
            ", line 7: AttributeError: 'NoneType' object has no attribute 'steps'",
        ),
        (GOOD + "    return {}[arg]\n", ", line 6: KeyError: ''"),
        (GOOD + "    return 1 // 0\n", ", line 6: ZeroDivisionError: "),
        (GOOD + "    raise RuntimeError('no')\n", ", line 6: RuntimeError: no"),
        (GOOD, "returned NoneType; expected a ConfigDict"),
        ("import nothing_like_this\n", ", line 1: ModuleNotFoundError: No module named 'nothing_like_this'"),
        (
            "def get_config():\n    return 3\n",
            "x.py: TypeError: get_config() takes 0 positional arguments but 1 was given",
        ),
        ("config = 3\n", "defines no get_config(arg)"),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line_that_says_where(tmp_path, source, said):
    file = write(tmp_path, source)
    with pytest.raises(ConfigError) as caught:
        config_file.load(file)
    assert file in str(caught.value) and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_files_own_config_error_is_kept(tmp_path):
    source = "from jaxlm.errors import ConfigError\n\n\ndef get_config(arg):\n    raise ConfigError(f'no size {arg}')\n"
    with pytest.raises(ConfigError, match="^no size 3b$"):
        config_file.load(write(tmp_path, source) + ":3b")


def arguments(path):
    """The empty one, and what the file's text gives as `name.py:argument` or in the line that begins with `arg:`."""
    text = path.read_text()
    listed = " ".join(re.findall(r"^arg: .*", text, re.MULTILINE))
    found = re.findall(rf"{path.name}:([\w.]*\w)", text) + re.findall(r'(?<=")\w+(?=")|\b\d[\d.]*[mb]\b', listed)
    return ["", *sorted(set(found))]


@pytest.mark.parametrize(
    "spec",
    [f"{path}:{arg}" for path in sorted((ROOT / "configs").glob("*.py")) for arg in arguments(path)],
    ids=lambda spec: Path(spec).name,
)
def test_a_config_in_the_repository_resolves(spec):
    assert stages(config.resolve(config_file.load(spec)).optimizer.to_dict())
