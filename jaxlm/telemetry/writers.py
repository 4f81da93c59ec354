"""Where metrics go: metrics.jsonl (the record), TensorBoard, Weights & Biases.

A resumed run has each step once: what an earlier process wrote after the checkpoint is dropped, since it comes again.
In W&B, which drops nothing, it is there twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxlm import files, redact
from jaxlm.config import flat
from jaxlm.errors import ConfigError, DataError, JaxlmError, nearest

METRICS = "metrics.jsonl"
_NON_FINITE = ("nan", "inf", "-inf")


class Writer(Protocol):
    """One place where metrics go. May raise, an OSError where the next row may do better; `Writers` deals with it."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Writers:
    """Several writers as one, of which none ends the run: one that fails is told of, and switched off if for good.

    Args:
      say: takes a line for people.
    """

    def __init__(self, writers: Mapping[str, Writer], say: Callable[[str], None]):
        self._writers, self._say = dict(writers), say
        self._behind: set[str] = set()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes scalars of completed step `step`; steps never decrease, and may repeat (train and eval rows)."""
        numbers = {name: float(value) for name, value in metrics.items()}
        for name, writer in list(self._writers.items()):
            try:
                writer.write(step, numbers)
            except OSError as error:  # such as a full disk, which may have room again
                if name not in self._behind:
                    self._say(_warning(name, f"can't write step {step}, and tries again with each row to come", error))
                self._behind.add(name)
            except Exception as error:
                del self._writers[name]
                self._say(_warning(name, f"is off from step {step}", error))
                with contextlib.suppress(Exception):
                    writer.close()
            else:
                if name in self._behind:
                    self._say(f"writer {name!r} writes again, from step {step}")
                self._behind.discard(name)

    def close(self) -> None:
        """Flushes and closes all; a second call does nothing."""
        while self._writers:
            name, writer = self._writers.popitem()
            try:
                writer.close()
            except Exception as error:
                self._say(_warning(name, "did not close well, and its last rows may be lost", error))

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_writers(
    names: Sequence[str], workdir: Path, config: Mapping[str, Any], resume_step: int, say: Callable[[str], None]
) -> Writers:
    """Opens writers by name: "jsonl", "tensorboard", "wandb". For one process of the run only.

    Args:
      workdir: the run directory; created if missing.
      config: the resolved config, shown with the run where a writer can, less its secrets.
      resume_step: completed steps of the checkpoint that the run continues from, 0 for none. Rows of later steps are
        dropped, or hidden where they can't be.
      say: takes a line for people.

    Raises:
      ConfigError: an unknown name, wandb is not installed, or it is not logged in.
      DataError: an existing metrics.jsonl is damaged before its last line.
      OSError: the run directory can't be written.
    """
    kinds: dict[str, Callable[[Path, Mapping[str, Any], int], Writer]]
    kinds = {"jsonl": _Jsonl, "tensorboard": _TensorBoard, "wandb": _Wandb}
    for name in names:
        if name not in kinds:
            raise ConfigError(f"unknown writer {name!r} in log.writers: {nearest(name, kinds)}")
    workdir.mkdir(parents=True, exist_ok=True)
    config = redact.fields(config)
    opened: dict[str, Writer] = {}
    for name in names:
        try:
            opened[name] = kinds[name](workdir, config, resume_step)
        except (JaxlmError, OSError):
            Writers(opened, say).close()
            raise
        except Exception as error:  # such as a server that is down, which must not keep a run from resuming
            say(_warning(name, "is off", error))
    return Writers(opened, say)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, non-finite numbers as floats again. A torn last line, of a killed run, is left out.

    Raises:
      DataError: a line before the last is not a row.
      OSError: the file can't be read.
    """
    return [floats(row) for _, row in _rows(path.read_bytes(), path)]


def floats(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as JSON gives it, with its non-finite numbers, which are strings there, as floats again."""
    return {name: float(value) if value in _NON_FINITE else value for name, value in row.items()}


def json_line(value: Any) -> str:
    """JSON in a line, with numbers that are not finite as strings: only Python would read a bare NaN."""

    def written(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: written(inner) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return list(map(written, value))
        return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(written(value), allow_nan=False) + "\n"


class _Appended:
    """A file that only grows, at once with each write. What a full disk keeps out comes before what is written next:
    so it may end in half a row for a while, and never holds one in its middle."""

    def __init__(self, path: Path):
        self._file, self._waiting = path.open("ab", buffering=0), b""

    def write(self, data: bytes) -> None:
        self._waiting += data
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def close(self) -> None:
        with self._file:
            self.write(b"")


class _Jsonl:
    """Rows `{"step": 10, "time": <unix seconds>, "train/loss": ...}`."""

    def __init__(self, workdir: Path, config: Mapping[str, Any], resume_step: int):
        path = workdir / METRICS
        if path.exists():
            _drop_after(resume_step, path)
        self._file = _Appended(path)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(json_line({"step": step, "time": round(time.time(), 3), **metrics}).encode())

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    """An event file for each process. tensorboardX writes one in a thread, which dies of a full disk, and then waits
    for it without end: from it we take what an event is."""

    def __init__(self, workdir: Path, config: Mapping[str, Any], resume_step: int):
        from tensorboardX.proto.event_pb2 import SessionLog

        # TensorBoard reads the files in the order of their names.
        self._file = _Appended(workdir / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}")
        self._add(file_version="brain.Event:2")
        # Event files only grow; this event tells TensorBoard which of the earlier ones to hide. Also from step 0: the
        # run may have been killed before its first checkpoint.
        self._add(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._add(step=step, summary=Summary(value=values))

    def _add(self, **fields: Any) -> None:
        """A record: the length of an event, the event, and a checksum of each."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c

        event = Event(wall_time=time.time(), **fields).SerializeToString()
        parts = [struct.pack("<Q", len(event)), event]
        self._file.write(b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in parts))

    def close(self) -> None:
        self._file.close()


class _Wandb:
    def __init__(self, workdir: Path, config: Mapping[str, Any], resume_step: int):
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("log.writers has 'wandb', which is not installed: pip install jaxlm[wandb]") from error

        # In a file, so that the run stays the same one when its directory moves, and a new one when it is deleted.
        id_file = workdir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        try:
            self._run = wandb.init(
                dir=workdir,
                project="jaxlm",
                name=workdir.resolve().name,
                id=id_file.read_text().strip(),
                resume="allow",
                config=flat(config),
                allow_val_change=True,  # a run that resumes with more steps
                settings=wandb.Settings(quiet=True, console="off"),  # capturing the console breaks the progress bar
            )
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            hint = "run `wandb login`, set WANDB_MODE=offline, or take 'wandb' out of log.writers"
            raise ConfigError(f"wandb does not start: {error}; {hint}") from error
        # Its own count of steps only grows, and a run that goes back to a checkpoint has other numbers from there.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, "step": step})

    def close(self) -> None:
        self._run.finish()


def _rows(text: bytes, path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each line and the row that it holds. No proper prefix of a row is valid JSON, so a torn line always shows."""
    lines = [line for line in text.split(b"\n") if line.strip()]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not (isinstance(row, dict) and isinstance(row.get("step"), int)):
                raise ValueError("not an object with a step")
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise DataError(f"{path}, row {number} of {len(lines)}: {error}; remove this line") from error
        rows.append((line, row))
    return rows


def _drop_after(step: int, path: Path) -> None:
    old = path.read_bytes()
    new = b"".join(line + b"\n" for line, row in _rows(old, path) if row["step"] <= step)
    if new != old:
        with files.atomic(path) as file:
            file.write(new)


def _warning(name: str, what: str, error: Exception) -> str:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return f"warning: writer {name!r} {what}: {reason}"
