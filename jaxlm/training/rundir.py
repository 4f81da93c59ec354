"""The run directory: which run lives there, how it stands, and what may change when it goes on.

config.json  status.json  tokenizer.json  metrics.jsonl  log.txt  loss.png  checkpoints/<step>/...
"""

from __future__ import annotations

import json
import operator
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import FrozenConfigDict

from jaxlm import config, config_json, files, functions, redact
from jaxlm.data import tokenizers
from jaxlm.errors import ConfigError, DataError, JaxlmError
from jaxlm.telemetry import writers
from jaxlm.training.step_folders import StepFolders

FREE = (
    "steps",
    "steps_per_call",
    "strict",
    "eval.",
    "checkpoint.",
    "divergence.",
    "early_stopping.",
    "log.",
    "parallel.",
    "model.attention",
    "model.loss_chunks",
    "model.remat",
    "model.unroll",
    "data.batch_size",
    "data.micro_batches",
    "data.cache_dir",
)
"""Fields that may differ when a run goes on: they change no parameter's shape and no batch's content."""

CHECKPOINTS = "checkpoints"
"""The folder of a run directory that holds them."""

STUDY = "study.json"
"""What only the directory of a study holds."""


class Status(NamedTuple):
    """How a run stands, as its status.json says."""

    status: str  # "running", "done", "stopped early", "preempted", "interrupted", "diverged" or "failed"
    step: int  # completed steps


def prepare(workdir: Path, cfg: FrozenConfigDict, tokenizer: tokenizers.Tokenizer) -> list[str]:
    """Checks that this config may go on with the run in a directory, if one is there. Writes config and tokenizer.

    Returns:
      what changed since the last time, as lines to say.

    Raises:
      ConfigError: another run lives there, or one that is past the config's last step, or a study; says how to go on.
      DataError: the tokenizer is another, or the directory can't be written.
    """
    changed = []
    if (workdir / STUDY).exists():
        raise ConfigError(f"{workdir} is a study's directory; give the run another --workdir")
    if (workdir / "config.json").exists() and begun(workdir):
        changed = check(read_config(workdir), cfg, f"run directory {str(workdir)!r}")
        if read_tokenizer(workdir).fingerprint != tokenizer.fingerprint:
            raise DataError(
                f"the tokenizer {cfg.data.tokenizer!r} differs from the one that {str(workdir)!r} was trained with; "
                "give another --workdir, or the data that the run began with"
            )
    if (latest := max(_steps(workdir), default=0)) > cfg.steps:
        raise ConfigError(
            f"steps is {cfg.steps}, and the run in {str(workdir)!r} has a checkpoint of step {latest}: give at least "
            f"{latest}, or another --workdir for a shorter run. An earlier checkpoint that is kept is read as "
            f"--checkpoint={workdir / CHECKPOINTS}/STEP"
        )
    for path, name in config_json.objects(cfg).items():
        changed.append(f"config.json can't hold {path}, {name}: give the same from Python to go on")
    write(workdir / "tokenizer.json", tokenizer.to_json())
    write(workdir / "config.json", config_json.to_json(cfg))  # last: with it this is a run's directory
    return changed


def begun(workdir: Path) -> bool:
    """Whether a run has left something there: a checkpoint, or a row of metrics. One that found out no more than that
    its config is wrong has not."""
    metrics = workdir / writers.METRICS
    return bool(_steps(workdir)) or (metrics.exists() and metrics.stat().st_size > 0)


def _steps(workdir: Path) -> list[int]:
    return StepFolders(workdir / CHECKPOINTS, writable=False).steps()


def check(old: FrozenConfigDict, new: FrozenConfigDict, where: str) -> list[str]:
    """What changed between two configs, as lines to say.

    Raises:
      ConfigError: the new one may not go on with what `where` holds; names the fields and how to go on.
    """
    differing = config.differences(old, config_json.from_json(config_json.to_json(new)))
    hidden = [path for path, values in differing.items() if any(redact.REDACTED in str(value) for value in values)]
    fixed = {path: values for path, values in differing.items() if not path.startswith((*FREE, *hidden))}
    if fixed:
        listed = "; ".join(f"{path} was {was!r}, is {now!r}" for path, (was, now) in fixed.items())
        if any(str(now).startswith("<") for _, now in fixed.values()):
            listed += " (a Python object's name and the digest of its code, with the numbers inside)"
        raise ConfigError(
            f"{where} holds a run of another config: {listed}. "
            "Give another --workdir, for a new run or a branch of that one (init_from with init_state=True), or leave "
            "these as they were to go on with that one"
        )
    return [f"{path} changed from {was!r} to {now!r}" for path, (was, now) in differing.items()]


def edits(code: Mapping[str, str], old: FrozenConfigDict, new: FrozenConfigDict) -> list[str]:
    """Which functions that two configs name alike are no longer what they were, as lines to say.

    Args:
      code: of the old one's, see `functions.digests`.
    """
    now, before, after = functions.digests(new), config.flat(old), config.flat(new)
    return [
        f"warning: the code of {path}, {after[path]!r}, is not what it was when the run was saved"
        for path in code
        if before.get(path) == after.get(path) and now.get(path) != code[path]
    ]


def read_config(workdir: Path) -> FrozenConfigDict:
    """The resolved config of a run.

    Raises:
      DataError: there is none, or it is damaged.
    """
    return _read(workdir / "config.json", config_json.from_json)


def read_tokenizer(workdir: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a run.

    Raises:
      DataError: there is none, or it is damaged.
    """
    return _read(workdir / "tokenizer.json", tokenizers.from_json)


def write_status(workdir: Path, status: str, step: int, result: int | None = None) -> None:
    """Writes status.json: what `Status` holds, and which process says so.

    Args:
      result: for people: the step that is the run's result, where that is not its latest. The checkpoints tell it too.
    """
    found = {"status": status, "step": step, "time": round(time.time(), 3)}
    found |= {"pid": os.getpid(), "host": socket.gethostname()} | ({} if result is None else {"result": result})
    write(workdir / "status.json", json.dumps(found))


def read_status(workdir: Path) -> Status | None:
    """How the run of a directory stands; None where no status.json tells."""
    try:
        found = json.loads((workdir / "status.json").read_bytes())
        return Status(str(found["status"]), operator.index(found["step"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all.

    Raises:
      DataError: the directory is read-only or full.
    """
    try:
        with files.atomic(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise DataError(f"{path} can't be written: {error.strerror}; give another --workdir or make room") from error


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    if path.exists() and not path.is_file():  # a pipe would keep its reader waiting
        raise DataError(f"{path} is not a file")
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path.parent} is no run directory: it has no {path.name}") from error
    except (JaxlmError, OSError, UnicodeDecodeError) as error:
        raise DataError(f"can't read {path}: {error}") from error
