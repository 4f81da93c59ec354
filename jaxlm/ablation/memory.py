"""What a study remembers from call to call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from jaxlm import files
from jaxlm.ablation.study import Trial
from jaxlm.errors import DataError


class Memory:
    """What a study must not decide twice, kept in its directory: the lanes of each program, the seconds and joules of a
    step, all measured, and which trials it had when it last ran. Where an arm is tuned, the point at which it will be
    compared isn't known before: its trials are noted as they would be without one.

    Raises:
      DataError: the file is damaged.
    """

    def __init__(self, path: Path | None = None):
        self._path = path
        self.lanes: dict[str, int] = {}
        self.steps: dict[str, dict[str, float]] = {"seconds": {}, "joules": {}}
        self._trials: dict[str, str] = {}
        if path is not None and path.exists():
            try:
                read = json.loads(path.read_text(encoding="utf-8"))
                self.lanes, self.steps, self._trials = read["lanes"], read["steps"], read["trials"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path} is damaged: {error!r}; delete it, and its numbers are taken anew") from error

    def write(self) -> None:
        if self._path is not None:
            value = {"lanes": self.lanes, "steps": self.steps, "trials": self._trials}
            with files.atomic(self._path) as file:
                file.write(json.dumps(value, indent=1).encode())

    def note(self, trials: Sequence[Trial]) -> list[str]:
        """Takes down which trials the study has now; how they differ from those that it had, as lines to say."""
        now = {one.address: one.title for one in trials}
        before, self._trials = self._trials, now
        self.write()
        gone = [title for address, title in before.items() if address not in now]
        new = [title for address, title in now.items() if address not in before]
        if not before or not (gone or new):
            return []
        kept = f", {len(gone)} are no longer looked at but keep their directories ({_few(gone)})" if gone else ""
        added = f" ({_few(new)})" if new else ""
        return [f"the study was edited: {len(now) - len(new)} trials stay, {len(new)} are new{added}{kept}"]


def _few(titles: Sequence[str]) -> str:
    return ", ".join(titles[:3]) + (", ..." if len(titles) > 3 else "")
