"""The folders of a run's checkpoints: which are whole, and what becomes of the others.

A step counts only once its manifest is there, which is written last. A step that does not match it is never used: it
is moved to <run>/damaged, and the one before it is taken.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from jaxlm.errors import DataError
from jaxlm.training import manifest

_COMMITTED = "commit_success.txt"  # of Orbax, written last of its files


class Gone(DataError):
    """A checkpoint was removed while it was read: the run that it is of goes on, and has later ones."""


class StepFolders:
    """checkpoints/<step>/... of one run.

    Args:
      directory: the run's `checkpoints` directory.
      writable: False for reading only: moves nothing, removes nothing.
    """

    def __init__(self, directory: Path, writable: bool):
        self.directory, self._writable = directory.absolute(), writable
        self._told: list[str] = []
        if writable:
            self._tidy()

    def _tidy(self) -> None:
        """Moves aside what was a checkpoint, or became one unchecked; removes what was being written or removed."""
        for folder in self.directory.glob("*.removed"):
            shutil.rmtree(folder, ignore_errors=True)
        for step in self._folders():
            listed, committed = (self.folder(step) / name for name in (manifest.NAME, _COMMITTED))
            if listed.exists() != committed.exists():
                missing = _COMMITTED if listed.exists() else manifest.NAME
                self._set_aside(step, f"{missing} is missing")
        self.remove_unfinished()

    def remove_unfinished(self) -> None:
        """Removes what is left of saves that did not come to their end."""
        for step in set(self._folders()) - set(self.steps()):
            shutil.rmtree(self.folder(step), ignore_errors=True)

    def _folders(self) -> list[int]:
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())

    def folder(self, step: int) -> Path:
        return self.directory / str(step)

    def steps(self) -> list[int]:
        """The finished checkpoints, oldest first. Whether they are whole still, `whole` tells."""
        return [step for step in self._folders() if (self.folder(step) / manifest.NAME).exists()]

    def whole(self, wanted: int | None = None, item: str = "") -> int | None:
        """`wanted`, or the latest step that is whole; None where there is none.

        Args:
          item: look only at this part of it, "params", "state" or "data".

        Raises:
          DataError: the step that is wanted is not there, or damaged.
          Gone: what was looked at is not there any more.
        """
        steps = self.steps()
        if wanted is not None and wanted not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise DataError(f"no checkpoint of step {wanted} in {self.directory}; there are: {there}")
        for step in reversed(steps) if wanted is None else [wanted]:
            try:
                manifest.verify(self.folder(step), item)
                return step
            except ValueError as error:
                if wanted is not None or not self.folder(step).exists():
                    raise self.damaged(step, str(error)) from error
                self._set_aside(step, str(error))
        return None

    def _set_aside(self, step: int, reason: str) -> None:
        aside, where = self.directory.parent / "damaged" / str(step), "is not used"
        if self._writable:
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            self.folder(step).rename(aside)
            where = f"was moved to {aside}"
        self._told.append(f"warning: checkpoint {self.folder(step)} is damaged ({reason}) and {where}")

    def tell(self) -> list[str]:
        """What was found damaged since it was last asked for, as lines to say."""
        told, self._told = self._told, []
        return told

    def damaged(self, step: int, reason: str) -> DataError:
        """The error that says so; or that it is `Gone`."""
        others = ", ".join(str(other) for other in self.steps() if other != step) or "none"
        if not self.folder(step).exists():
            why = "as a run does that goes on (checkpoint.keep)"
            return Gone(f"checkpoint {self.folder(step)} was removed while it was read, {why}; there are: {others}")
        return DataError(f"checkpoint {self.folder(step)} is damaged ({reason}); others that are there: {others}")

    def prune(self, keep: int, best: str) -> None:
        """Removes all but the latest `keep` and the one that is lowest by the metric `best`; the first of equals."""
        steps, ranked = self.steps(), []
        for step in steps:
            with contextlib.suppress(ValueError):  # what is damaged is no one's best
                facts = manifest.read(self.folder(step))
                if facts["metric"] is not None and facts.get("of", best) == best:
                    ranked.append((facts["metric"], step))
        for old in set(steps) - {*steps[-keep:], *([min(ranked)[1]] if ranked and best else [])}:
            removed = self.folder(old).rename(self.directory / f"{old}.removed")  # at once, whatever happens next
            shutil.rmtree(removed, ignore_errors=True)
