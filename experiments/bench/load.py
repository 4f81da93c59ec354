"""Suite `load`: a model from a run directory and from a Hugging Face folder, and the memory that this takes.

A process for each measurement. Both folders hold the same parameters; beside them in the run's step lie the moments of
Adam, which nobody needs to read.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiments.bench import machine
from experiments.bench.cases import BABY, GPT2, Case
from experiments.bench.checkpoint import state_of
from experiments.bench.remote import Remote
from experiments.bench.report import Limit, Row
from experiments.bench.timing import Spread, interleave, spread

LIMIT = Limit("value", "<=", 2.5)
PEER = "transformers"
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Loaded(NamedTuple):
    seconds: float
    peak: float  # of the memory that the process took beyond what it had before, over the bytes of the parameters


def run(quick: bool) -> list[Row]:
    if not RESET.exists():
        machine.say("load: memory is read in /proc, and there is none here")
        return []
    case = BABY._replace(vocab_size=257) if quick else GPT2._replace(vocab_size=50257, dtype="float32")
    return measure(case, rounds=1 if quick else 5)


def measure(case: Case, rounds: int) -> list[Row]:
    peaks: dict[str, list[float]] = {}

    def block(side: str, folder: Path) -> Callable[[], float]:
        def timed() -> float:
            with Remote(f"experiments.bench.load:{side}") as fresh:
                found = fresh.call("load", str(folder))
            peaks.setdefault(f"{side} {folder.name}", []).append(found.peak)
            return found.seconds

        return timed

    with tempfile.TemporaryDirectory() as temporary:
        run, folder = Path(temporary) / "run", Path(temporary) / "folder"
        machine.say(f"load: writing {case.name}")
        with Remote("experiments.bench.load:Jaxlm") as maker:
            maker.call("make", case, str(run), str(folder))
        blocks = {f"Jaxlm {path.name}": block("Jaxlm", path) for path in (run, folder)}
        if machine.has("torch", "transformers"):
            blocks["Peer folder"] = block("Peer", folder)
        machine.say(f"load: {rounds} rounds")
        seconds = interleave(blocks, rounds)
    memory = {name: spread(found) for name, found in peaks.items()}

    def row(what: str, unit: str, found: dict[str, Spread], name: str, limit: Limit | None = None) -> Row:
        peer = found.get("Peer folder")
        return Row("load", f"{case.name}, fp32: {what}", unit, found[name], PEER if peer else "", peer, limit)

    rows = []
    for name, what in (("Jaxlm run", "a run directory"), ("Jaxlm folder", "a Hugging Face folder")):
        rows.append(row(f"loading {what}", "s", seconds, name))
        rows.append(row(f"{what}: peak memory, over the parameters' bytes", "", memory, name, LIMIT))
    return rows


class Jaxlm:
    """`jaxlm.load`, in a process that has started JAX."""

    def __init__(self) -> None:
        import jax

        import jaxlm

        self._load = jaxlm.load
        jax.numpy.zeros(1).block_until_ready()

    def load(self, folder: str) -> Loaded:
        import jax

        return _measured(lambda: jax.tree.leaves(jax.block_until_ready(self._load(folder).params)))

    def make(self, case: Case, run: str, folder: str) -> None:
        """A run directory with one step, of initial parameters and moments that don't compress; and its export."""
        from jaxlm.data.tokenizers import Bytes
        from jaxlm.training import position, rundir
        from jaxlm.training.checkpoint import Checkpoints
        from jaxlm.training.export import export

        cfg, state = state_of(case)
        Path(run).mkdir()
        rundir.prepare(Path(run), cfg, Bytes())
        with Checkpoints(Path(run) / "checkpoints") as checkpoints:
            checkpoints.save(state, position.Position(0, "")._asdict(), cfg, {})
        export(run, folder)


class Peer:
    """`GPT2LMHeadModel.from_pretrained`."""

    def __init__(self) -> None:
        from transformers import GPT2LMHeadModel

        self._load: Any = GPT2LMHeadModel.from_pretrained

    def load(self, folder: str) -> Loaded:
        def load() -> list[Any]:
            parameters = list(self._load(folder).parameters())
            for parameter in parameters:
                parameter.sum()  # it maps the file, and reads a page when that is first looked at
            return parameters

        return _measured(load)


def _measured(load: Callable[[], list[Any]]) -> Loaded:
    RESET.write_text("5")  # the highest resident set so far is from now on the highest
    before, begin = _memory("VmRSS"), time.perf_counter()
    leaves = load()
    seconds = time.perf_counter() - begin
    return Loaded(seconds, (_memory("VmHWM") - before) / sum(leaf.nbytes for leaf in leaves))


def _memory(name: str) -> int:
    """Bytes, by the kernel's count."""
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert found, name
    return int(found[1]) * 1024
