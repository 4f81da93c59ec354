"""What a study remembers from call to call."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import FrozenConfigDict

from jaxlm import files
from jaxlm.ablation.study import Trial, trial
from jaxlm.errors import DataError

Over = Callable[[str], bool]


class Memory:
    """What a study must not decide twice, kept in its directory: the lanes of each program, the seconds and joules of a
    step, all measured, which trials it had when it last ran, and the designs under which results were seen. Where an
    arm is tuned, the point at which it will be compared isn't known before: its trials are noted as they would be
    without one.

    Raises:
      DataError: the file is damaged.
    """

    def __init__(self, path: Path | None = None):
        self._path = path
        self.lanes: dict[str, int] = {}
        self.steps: dict[str, dict[str, float]] = {"seconds": {}, "joules": {}}
        self._trials: dict[str, str] = {}
        self._designs: list[dict[str, Any]] = []
        if path is not None and path.exists():
            try:
                read = json.loads(path.read_text(encoding="utf-8"))
                self.lanes, self.steps, self._trials = read["lanes"], read["steps"], read["trials"]
                self._designs = [one for one in read.get("designs", []) if "arms" in one]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path} is damaged: {error!r}; delete it, and its numbers are taken anew") from error

    def write(self) -> None:
        if self._path is not None:
            value = {"lanes": self.lanes, "steps": self.steps, "trials": self._trials, "designs": self._designs}
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

    def design(
        self, arms: Mapping[str, FrozenConfigDict], seeds: Sequence[int], trials: Sequence[Trial], over: Over
    ) -> list[str]:
        """Takes down what is compared now; what of it was changed after results were seen, as lines to say.

        An earlier design counts if it gave results, one of its trials at least, before it was changed, and if it shares
        an arm with this one: else this one's results are new.

        Args:
          arms: variant -> its config, at no tuned point.
          trials: those that are compared.
          over: whether the trial of an address is over.
        """
        if self._designs and (waiting := self._designs[-1]["trials"]):
            if any(map(over, waiting)):
                self._designs[-1]["trials"] = []  # it is seen, whatever becomes of their directories
            else:
                self._designs.pop()
        addresses = {name: trial(cfg, name, 0).address for name, cfg in arms.items()}
        now = {"arms": addresses, "seeds": list(seeds)}
        if not self._designs or self._designs[-1] | now != self._designs[-1]:
            self._designs.append(now | {"trials": [one.address for one in trials if not over(one.address)]})
        self.write()
        same = set(addresses.values())
        related = [one for one in self._designs if same & set(one["arms"].values())]
        return _changed_seeds(related) + _lost(related)


def _changed_seeds(designs: Sequence[Mapping[str, Any]]) -> list[str]:
    seeds = [tuple(one) for one, _ in itertools.groupby(one["seeds"] for one in designs)]
    if len(seeds) == 1:
        return []
    what = "added" if all(set(a) < set(b) for a, b in itertools.pairwise(seeds)) else "changed"
    listed = ", then ".join(map(str, seeds))
    return [f"seeds were {what} after results were seen: {listed}; the intervals do not account for it"]


def _lost(designs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The variants that the last design has under no name: dropped, or others now under theirs."""
    now = designs[-1]["arms"]
    arms = [arm for one in designs for arm in one["arms"].items()]
    gone = dict.fromkeys(name for name, address in arms if address not in now.values())
    said = []
    for what, names, effect in (
        ("dropped", [name for name in gone if name not in now], "does not count them"),
        ("edited", [name for name in gone if name in now], "counts one edition only"),
    ):
        if names:
            listed = f"variants were {what} after results were seen: {', '.join(names)}"
            said.append(f"{listed}; the correction for several {effect}")
    return said


def _few(titles: Sequence[str]) -> str:
    return ", ".join(titles[:3]) + (", ..." if len(titles) > 3 else "")
