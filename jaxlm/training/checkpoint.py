"""Checkpoints by Orbax: checkpoints/<step>/{params,state,data,config}, written and listed while training goes on."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import FrozenConfigDict
from orbax.checkpoint import options

from jaxlm import config_json, tree
from jaxlm.errors import DataError
from jaxlm.training import manifest, position, processes
from jaxlm.training.step import PyTree, State
from jaxlm.training.step_folders import StepFolders


class Restored(NamedTuple):
    state: State
    data: dict[str, Any]  # where the data stands, and of what data; see `position`
    config: FrozenConfigDict  # of the run when it was saved


class Checkpoints(StepFolders):
    """The checkpoints of one run directory. Close it, or use it as a context, so that the last save is whole.

    Of processes that train together each has one, on a file system that they share, and all call the same: each writes
    and reads its part of the arrays, and the first one sees to the folders.

    Args:
      directory: the run's `checkpoints` directory; made when writing.
      keep: so many of the latest stay.
      best: and the one with the lowest value of this metric; "" for none.
      writable: False for reading only: makes nothing, moves nothing, removes nothing.

    Attributes:
      failures: saves that failed since the last that did not.
    """

    def __init__(self, directory: Path, *, keep: int = 1, best: str = "", writable: bool = True):
        super().__init__(directory, writable and processes.first())
        self._creates, self._keep, self._best, self.failures = writable, keep, best, 0
        if writable:
            processes.first_does(lambda: None)  # what lay about is gone
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._finishing: Future[None] | None = None
        logging.getLogger("absl").addFilter(_unheard)
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "state": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                atomicity_options=options.AtomicityOptions(mode=options.AtomicityMode.COMMIT_FILE),
                create=self._creates,
                cleanup_tmp_directories=self._creates,
            ),
        )

    def whole(self, wanted: int | None = None, item: str = "") -> int | None:
        return processes.first_does(lambda: super(Checkpoints, self).whole(wanted, item))

    def save(self, state: State, data: Mapping[str, Any], cfg: FrozenConfigDict, metrics: Mapping[str, float]) -> None:
        """Starts a save of the state under its step; a step that is there already is left as it is.

        Args:
          data: JSON values.
          metrics: what `best` is looked up in; empty where nothing was evaluated at this step.

        Raises:
          DataError: the save, or the one before, failed; nothing is left of it, and others are whole.
        """
        step = int(state.step)
        self.wait()
        if processes.first_does(lambda: step in self.steps()):
            return
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        with self._writing():
            if processes.first_does(lambda: shutil.disk_usage(self.directory).free) < needed:
                raise OSError(f"step {step} needs {needed / 1e6:,.0f} MB")
            self._manager.reload()  # others may have gone
            storable = jax.tree.map(_storable, state)
            self._manager.save(
                step,
                force=True,  # also below a step that is there
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(storable.params),
                    state=ocp.args.StandardSave(_rest(storable)),
                    data=ocp.args.JsonSave(dict(data)),
                    config=ocp.args.JsonSave(json.loads(config_json.to_json(cfg))),
                ),
            )
        value = position.lowest(metrics, self._best, "checkpoint.best") if metrics and self._best else math.nan
        metric = value if math.isfinite(value) else None
        self._finishing = self._thread.submit(self._finish, step, metric)

    def _finish(self, step: int, metric: float | None) -> None:
        """In a thread of its own: waits until the files are written, lists them, and lets go of older steps."""
        self._manager.wait_until_finished()
        if processes.first():
            manifest.write(self.folder(step), step=step, metric=metric, of=self._best)
            self.prune(self._keep, best=self._best)
        self.failures = 0

    def done(self) -> bool:
        """Whether no save is under way; if so, `wait` does not block."""
        return self._finishing is None or self._finishing.done()

    def wait(self) -> None:
        """Blocks until all that was saved is whole.

        Raises:
          DataError: a save failed; nothing is left of it, and those before it are whole.
        """
        finishing, self._finishing = self._finishing, None
        if finishing is not None:
            with self._writing():
                finishing.result()

    def restore(self, like: State, step: int) -> Restored:
        """The state of a step of `whole`, with the shapes, dtypes and shardings of `like`.

        Raises:
          DataError: it holds other parameters than `like` has, or can't be read.
        """
        stored = jax.tree.map(_storable, like)
        with self._reading(step):
            saved = self._manager.item_metadata(step)
            self._check({"params": stored.params}, {"params": saved.params.tree}, step)
            self._check(_rest(stored), saved.state.tree, step)
            items = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(stored.params),
                    state=ocp.args.StandardRestore(_rest(stored)),
                    data=ocp.args.JsonRestore(),
                    config=ocp.args.JsonRestore(),
                ),
            )
        state = State(params=items.params, **items.state)
        sized = jax.tree.map(lambda x, own: x if own.size else _zeros(own.shape, own), state, like)
        return Restored(sized, items.data, config_json.from_json(json.dumps(items.config)))

    def params(self, like: PyTree, step: int) -> PyTree:
        """The parameters alone of a step of `whole`, as `restore` gives them; nothing else of it is read.

        Args:
          like: parameters, or their shapes; where they have no sharding, the result lies on the first device.

        Raises:
          DataError: as `restore`.
        """
        placed = _placed(like)
        with self._reading(step):
            self._check({"params": placed}, {"params": self._manager.item_metadata(step).params.tree}, step)
            return self._manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(placed))).params

    def opt_state_shapes(self, step: int) -> PyTree:
        """What a step holds of the optimizer: shapes and dtypes, in plain dicts and lists, None where there is none.

        Raises:
          DataError: it can't be read.
        """
        with self._reading(step):
            return self._stored(step)["opt_state"]

    def opt_state(self, step: int) -> PyTree:
        """The arrays of `opt_state_shapes`, on the first device: for who does not know the optimizer.

        Raises:
          DataError: it is damaged.
        """
        self.whole(step, "state")
        with self._reading(step):
            like = ocp.args.StandardRestore(_placed(self._stored(step)))
            return self._manager.restore(step, args=ocp.args.Composite(state=like)).state["opt_state"]

    def _stored(self, step: int) -> PyTree:
        """The state of a step in shapes, but for its parameters."""
        saved = self._manager.item_metadata(step).state.tree
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved)

    def data(self, step: int) -> dict[str, Any]:
        """`Restored.data` of a step, alone.

        Raises:
          DataError: it is damaged.
        """
        self.whole(step, "data")
        with self._reading(step):
            data: dict[str, Any] = self._manager.restore(
                step, args=ocp.args.Composite(data=ocp.args.JsonRestore())
            ).data
            return data

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turns whatever Orbax raises into a clear error."""
        try:
            yield
        except DataError:
            raise
        except Exception as error:
            raise self.damaged(step, f"{type(error).__name__}: {error}".splitlines()[0][:200]) from error

    def _check(self, like: PyTree, saved: PyTree, step: int) -> None:
        """Orbax casts another dtype silently and words other shapes badly."""
        found = dict(zip(tree.paths(saved), map(_kind, jax.tree.leaves(saved)), strict=True))
        wanted = dict(zip(tree.paths(like), map(_kind, jax.tree.leaves(like)), strict=True))
        for path in sorted(found | wanted):
            if found.get(path) != wanted.get(path):
                raise DataError(
                    f"checkpoint {self.folder(step)} holds {found.get(path, 'nothing')} as {path!r}; "
                    f"this config expects {wanted.get(path, 'nothing')}"
                )

    def close(self) -> None:
        """Waits, and lets go of the directory. Raises as `wait`."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            with contextlib.suppress(Exception):
                self._manager.close()
            logging.getLogger("absl").removeFilter(_unheard)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what a failed save raises, here or of an earlier save, into one clear error; clears the rest away."""
        reason = None
        try:
            yield
        except Exception as error:
            cause = re.search(r"[^:]+ \[os_error_code[^\]]*\]", str(error))  # as the storage library puts it
            named = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            reason = (cause[0] if cause else named.splitlines()[0]).strip()[:300]
        if reason is None:
            return
        self.failures += 1
        _collect()
        free = shutil.disk_usage(self.directory).free / 1e6
        with contextlib.suppress(Exception):
            self._manager.close()
        self.remove_unfinished()
        self._manager = self._open()
        raise DataError(
            f"a checkpoint can't be written to {self.directory} ({free:,.0f} MB free): {reason}. "
            "Those before it are kept; make room and run the same command again"
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _placed(like: PyTree) -> PyTree:
    """Shapes, those without a sharding on the first device."""
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or first), like)


def _rest(state: State) -> dict[str, Any]:
    """What is saved beside the parameters, which may then be read alone."""
    return {name: part for name, part in state._asdict().items() if name != "params"}


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
    return _zeros((1,), leaf)


def _zeros(shape: tuple[int, ...], like: Any) -> jax.Array:
    return jax.device_put(np.zeros(shape, like.dtype), like.sharding)


def _kind(leaf: Any) -> str:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)  # as it is stored
    return f"{leaf.dtype}{list(leaf.shape)}"
