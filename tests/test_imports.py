"""The house: a file imports only from its own room or from a lower floor, and nothing goes in a circle."""

import ast
import graphlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# (floor, room) of every file and folder directly in jaxlm/. A new one needs a place here and in the design.
HOUSE = {
    "errors": (0, "errors"),
    "redact": (0, "redact"),
    "config": (1, "config"),
    "config_file": (1, "config"),
    "config_json": (1, "config"),
    "config_rules": (1, "config"),
    "files": (1, "files"),
    "functions": (1, "config"),
    "hub": (1, "hub"),
    "lookup": (1, "config"),
    "tree": (1, "tree"),
    "model": (2, "model"),
    "optim": (2, "optim"),
    "data": (2, "data"),
    "telemetry": (2, "telemetry"),
    "evals": (3, "evals"),
    "training": (4, "training"),
    "ablation": (5, "ablation"),
    "main": (6, "doors"),
    "sweep": (6, "doors"),
    "evaluate": (6, "doors"),
    "generate": (6, "doors"),
    "export": (6, "doors"),
    "tune": (6, "doors"),
}
DOORS = [name for name, (_, room) in HOUSE.items() if room == "doors"]
FLAX_LIVES_IN = "jaxlm.model.gpt2"

# What `import jaxlm` must leave alone: slow to import, or able to touch a GPU or the network.
HEAVY = {
    "datasets",
    "flax",
    "huggingface_hub",
    "jax",
    "jaxlib",
    "matplotlib",
    "optax",
    "optuna",
    "orbax",
    "plotly",
    "pyarrow",
    "ray",
    "safetensors",
    "scipy",
    "tensorboardX",
    "tensorflow",
    "tokenizers",
    "torch",
    "transformers",
    "wandb",
}


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of every module of root/jaxlm."""
    names = {}
    for path in sorted((root / "jaxlm").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(name: str, path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, module, attribute or "") of every import of a file, inside functions and conditions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                module = ".".join([*package, module]) if module else ".".join(package)
            yield from ((node.lineno, module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value, ""


def problems(root: Path) -> list[str]:
    """Every breach of the house rules under root/jaxlm, one line each."""
    found: list[str] = []
    known = modules(root)
    arrows: dict[str, set[str]] = {name: set() for name in known}

    for name, path in known.items():
        if name == "jaxlm":  # the front: may (lazily) import anything
            continue
        if name.split(".")[1] not in HOUSE:
            found.append(f"{path.relative_to(root)}: has no floor in HOUSE")
            continue
        floor, room = HOUSE[name.split(".")[1]]
        for line, module, attribute in imports(name, path):
            where = f"{path.relative_to(root)}:{line}"
            top = module.split(".")[0]
            if top == "flax" and name != FLAX_LIVES_IN:
                found.append(f"{where}: imports {module}: Flax lives in {FLAX_LIVES_IN} only")
            if top in ("configs", "experiments", "tests"):
                found.append(f"{where}: imports {module}: {top}/ may import jaxlm, never the reverse")
            if top != "jaxlm" or (module, attribute) == ("jaxlm", "__version__"):
                continue
            target = f"{module}.{attribute}" if f"{module}.{attribute}" in known else module
            if target not in known:
                found.append(f"{where}: imports {target}, which does not exist")
                continue
            if target == "jaxlm":
                found.append(f"{where}: imports the package itself; name the module")
                continue
            arrows[name].add(target)
            target_floor, target_room = HOUSE.get(target.split(".")[1], (floor, room))
            if target_room != room and target_floor >= floor:
                way = "up" if target_floor > floor else "across"
                found.append(
                    f"{where}: imports {target}: {way}, from {room} ({floor}) to {target_room} ({target_floor})"
                )

    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        found.append("circle: " + " -> ".join(error.args[1]))
    return found


def test_arrows_run_down():
    assert modules(ROOT), "found no modules: is this the repository?"
    assert problems(ROOT) == []


@pytest.mark.parametrize("door", DOORS)
def test_a_door_is_short(door):
    path = ROOT / "jaxlm" / f"{door}.py"
    if not path.exists():
        pytest.skip("not built yet")
    assert len(path.read_text(encoding="utf-8").splitlines()) < 100, "a door parses flags, makes one call and returns"


def test_importing_jaxlm_is_light():
    program = """
import sys

def refuse(event, args):
    if event.startswith(("socket.", "subprocess.")):
        raise SystemExit(f"import jaxlm caused {event} {args}")

sys.addaudithook(refuse)
import jaxlm
print(*{name.partition(".")[0] for name in sys.modules})
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "jaxlm" in done.stdout.split()
    assert HEAVY & set(done.stdout.split()) == set()


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        path = root / "jaxlm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return root


GOOD = {
    "__init__.py": "def train():\n    from jaxlm.training.loop import train\n    return train\n",
    "errors.py": "",
    "config.py": "from jaxlm.errors import E\n",
    "model/__init__.py": "",
    "model/gpt2.py": "import flax.linen as nn\nfrom jaxlm.model import losses\nfrom . import losses\n",
    "model/losses.py": "from jaxlm import config\nfrom ..errors import E\nimport jax\n",
    "optim/__init__.py": "",
    "evals/__init__.py": "from jaxlm.model import losses\n",
    "training/__init__.py": "",
    "training/loop.py": "import jaxlm.evals\nfrom jaxlm import __version__\n",
    "main.py": "def main():\n    from jaxlm.training import loop\n    return loop\n",
}


def test_a_good_tree_has_no_problems(tmp_path):
    assert problems(plant(tmp_path, GOOD)) == []


@pytest.mark.parametrize(
    ("file", "source", "problem"),
    [
        ("model/bad.py", "from jaxlm.training import loop", "jaxlm/model/bad.py:1: imports jaxlm.training.loop: up,"),
        ("model/bad.py", "def f():\n    import jaxlm.evals", "jaxlm/model/bad.py:2: imports jaxlm.evals: up,"),
        ("model/bad.py", "from ..training.loop import x", "jaxlm/model/bad.py:1: imports jaxlm.training.loop: up,"),
        ("model/bad.py", "from jaxlm import optim", "jaxlm/model/bad.py:1: imports jaxlm.optim: across,"),
        ("model/bad.py", "import importlib as i\ni.import_module('jaxlm.optim')", "imports jaxlm.optim: across,"),
        ("tree.py", "from jaxlm import config", "jaxlm/tree.py:1: imports jaxlm.config: across,"),
        ("errors.py", "from jaxlm import config", "jaxlm/errors.py:1: imports jaxlm.config: up,"),
        ("optim/bad.py", "from jaxlm import train", "jaxlm/optim/bad.py:1: imports the package itself"),
        ("optim/bad.py", "from flax.core import freeze", "jaxlm/optim/bad.py:1: imports flax.core: Flax lives in"),
        ("optim/bad.py", "import experiments.bench", "experiments/ may import jaxlm, never the reverse"),
        ("optim/bad.py", "import jaxlm.optim.nothing", "imports jaxlm.optim.nothing, which does not exist"),
        ("attic.py", "", "jaxlm/attic.py: has no floor in HOUSE"),
        ("model/losses.py", "from jaxlm.model import gpt2", "circle: jaxlm.model."),
    ],
)
def test_a_bad_tree_has_its_problem(tmp_path, file, source, problem):
    found = problems(plant(tmp_path, {**GOOD, file: source}))
    assert any(problem in line for line in found), found
