"""Checkpoints by Orbax: checkpoints/<step>/{state,data,config}, written while training goes on.

A step's directory counts only once its commit file is there; half-written ones are removed at the next start.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from ml_collections import FrozenConfigDict
from orbax.checkpoint import checkpoint_managers, options

from jaxlm import config, tree
from jaxlm.errors import DataError
from jaxlm.training.step import PyTree, State


class Restored(NamedTuple):
    state: State
    data: dict[str, Any]  # where the data stands, and of what data; see `loop`


class Checkpoints:
    """The checkpoints of one run directory. Close it, or use it as a context, so that the last save is whole.

    Args:
      directory: the run's `checkpoints` directory; made when writing.
      keep: so many of the latest stay.
      best: and the one with the lowest value of this metric; "" for none.
      writable: False for reading only: makes nothing, removes nothing.
    """

    def __init__(self, directory: Path, *, keep: int = 1, best: str = "", writable: bool = True):
        self.directory = directory.absolute()
        logging.getLogger("absl").addFilter(_unheard)
        policies: list[Any] = [checkpoint_managers.LatestN(keep)]
        if best:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: (
                        -metrics.get(best, math.inf),
                        -metrics["step"],
                    ),  # the first of equals
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                atomicity_options=options.AtomicityOptions(mode=options.AtomicityMode.COMMIT_FILE),
                create=writable,
                cleanup_tmp_directories=writable,
            ),
        )

    def steps(self) -> list[int]:
        """The whole checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: State, data: dict[str, Any], cfg: FrozenConfigDict, metrics: dict[str, float]) -> None:
        """Starts a save of the state under its step; a step that is there already is left as it is.

        Args:
          data: JSON values.
          metrics: what `best` is looked up in; empty where nothing was evaluated at this step.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise self._failed(f"step {step} needs {needed / 1e6:,.0f} MB")
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(jax.tree.map(_storable, state)),
                    data=ocp.args.JsonSave(data),
                    config=ocp.args.JsonSave(json.loads(config.to_json(cfg))),
                ),
                metrics={name: value for name, value in metrics.items() if math.isfinite(value)} | {"step": step},
            )

    def restore(self, like: State, step: int | None = None) -> Restored:
        """The state of a step, the latest by default, with the shapes, dtypes and shardings of `like`.

        Raises:
          DataError: no such step, or a damaged one, or other parameters than `like` has.
        """
        step = self.step(step)
        with self._reading(step):
            stored = jax.tree.map(_storable, like)
            self._check(stored, self._manager.item_metadata(step).state.tree, step)
            items = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(stored), data=ocp.args.JsonRestore())
            )
        whole = lambda x, own: x if own.size else jnp.zeros(own.shape, own.dtype)  # noqa: E731
        return Restored(jax.tree.map(whole, State(*items.state), like), items.data)

    def params(self, like: PyTree, step: int | None = None) -> PyTree:
        """The parameters alone of a step, as `restore` gives them; nothing else of it is read.

        Args:
          like: parameters, or their shapes; where they have no sharding, the result lies on the first device.

        Raises:
          DataError: as `restore`.
        """
        step = self.step(step)
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or first), like)
        part = {"params": placed}
        with self._reading(step), contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            self._check(part, {"params": self._manager.item_metadata(step).state.tree["params"]}, step)
            how = ocp.checkpoint_utils.construct_restore_args(part)
            return handler.restore(
                self.directory / str(step) / "state",
                args=ocp.args.PyTreeRestore(part, restore_args=how, partial_restore=True),
            )["params"]

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turns whatever Orbax raises of files that are truncated or missing into a clear error."""
        try:
            yield
        except DataError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            others = ", ".join(str(other) for other in self.steps() if other != step)
            raise DataError(
                f"checkpoint {self.directory / str(step)} is damaged, or can't be read ({reason}); "
                f"others that are there: {others or 'none'}"
            ) from error

    def step(self, wanted: int | None = None) -> int:
        """`wanted`, or the latest step.

        Raises:
          DataError: there is no such checkpoint; names those that there are.
        """
        steps = self.steps()
        if not steps or (wanted is not None and wanted not in steps):
            asked = "no checkpoint" if wanted is None else f"no checkpoint of step {wanted}"
            raise DataError(f"{asked} in {self.directory}; there are: {', '.join(map(str, steps)) or 'none'}")
        return steps[-1] if wanted is None else wanted

    def _check(self, like: PyTree, saved: PyTree, step: int) -> None:
        """Orbax casts another dtype silently and words other shapes badly."""
        found = dict(zip(tree.paths(saved), map(_kind, jax.tree.leaves(saved)), strict=True))
        wanted = dict(zip(tree.paths(like), map(_kind, jax.tree.leaves(like)), strict=True))
        for path in sorted(found | wanted):
            if found.get(path) != wanted.get(path):
                raise DataError(
                    f"checkpoint {self.directory / str(step)} holds {found.get(path, 'nothing')} as {path!r}; "
                    f"this config expects {wanted.get(path, 'nothing')}"
                )

    def wait(self) -> None:
        """Blocks until all that was saved is whole.

        Raises:
          DataError: a save failed; the checkpoints before it are whole.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the directory. Raises as `wait`."""
        try:
            with self._writing():
                self._manager.close()
        finally:
            logging.getLogger("absl").removeFilter(_unheard)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what a failed save raises, here or of an earlier save, into one clear error."""
        reason = None
        try:
            yield
        except Exception as error:
            cause = re.search(r"[^:]+ \[os_error_code[^\]]*\]", str(error))  # as the storage library puts it
            reason = (cause[0].strip() if cause else f"{type(error).__name__}: {error}".splitlines()[0])[:300]
        if reason is not None:
            _collect()
            raise self._failed(reason)

    def _failed(self, reason: str) -> DataError:
        free = shutil.disk_usage(self.directory).free / 1e6
        return DataError(
            f"a checkpoint can't be written to {self.directory} ({free:,.0f} MB free): {reason}. "
            "Those before it are kept; make room and run the same command again"
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _unheard(record: logging.LogRecord) -> bool:
    """False for what Orbax logs, with tracebacks, of failed saves: they are raised at the next wait as well."""
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


def _collect() -> None:
    """What a failed save leaves behind complains when it goes: let it go now, unheard."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    gc.collect()
    sys.unraisablehook = hook


def _storable(leaf: Any) -> Any:
    """An array or its shape; of one without elements, which Orbax can't store, one with a single zero."""
    if leaf.size:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((1,), leaf.dtype, sharding=leaf.sharding)
    return jnp.zeros(1, leaf.dtype)


def _kind(leaf: Any) -> str:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)  # as it is stored
    return f"{leaf.dtype}{list(leaf.shape)}"
