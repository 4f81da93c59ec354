"""What a person sees while a run trains: a bar in a terminal, one-line rows elsewhere. All on stderr."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    import rich.progress

_MEMORY = 30.0  # seconds over which the rate of steps forgets, so that the time left follows a change of pace


Item = TypeVar("Item")


def tracked(items: Sequence[Item], what: str, enabled: bool) -> Iterable[Item]:
    """The items, behind a bar on stderr that goes when they are through."""
    from rich.console import Console
    from rich.progress import track

    return track(items, what, console=Console(stderr=True), transient=True, disable=not enabled)


class View(Protocol):
    """What shows a run."""

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None: ...

    def say(self, text: str) -> None: ...


class Progress:
    """Shows step, loss, tokens/s and time left.

    with Progress(1000, every=10) as progress:
        progress.update(10, {"train/loss": 3.21, "throughput/tokens_per_second": 23456.0})
        progress.say("checkpoint at step 10")

    Args:
      total: steps of the whole run.
      start: steps that were complete before, when the run resumes.
      enabled: False shows neither bar nor rows; `say` still speaks.
      every: least steps between two rows where there is no terminal; 0 shows only evaluations and the last step.
    """

    def __init__(self, total: int, start: int = 0, enabled: bool = True, *, every: int):
        self._total, self._start, self._enabled, self._every = total, start, enabled, every
        self._row_step = start
        self._rate = Rate()
        self._latest: dict[str, float] = {}
        self._bar: rich.progress.Progress | None = None

    def __enter__(self) -> Progress:
        if self._enabled and on_terminal():
            self._bar = bar()
            self._bar.add_task("", total=self._total, completed=self._start, figures="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            with contextlib.suppress(OSError):  # its terminal is gone
                self._bar.stop()
            self._bar = None

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Moves to `step` completed steps; metrics by their names, of which train/loss, eval/loss and
        throughput/tokens_per_second are shown."""
        self._rate.add(step)
        self._row_step = min(self._row_step, step)  # a run may go back
        if not self._enabled:
            return
        left = self._rate.seconds_for(self._total - step)
        if self._bar:
            self._latest.update(metrics or {})
            self._bar.update(self._bar.task_ids[0], completed=step, figures=_figures(self._latest, left))
        elif metrics and self._row_is_due(step, metrics):
            self._row_step = step
            counter = f"step {step:>{len(str(self._total))}}/{self._total}"
            say(None, f"{counter}  {_figures(metrics, left)}".rstrip())

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        say(self._bar, text)

    def _row_is_due(self, step: int, metrics: Mapping[str, float]) -> bool:
        if step >= self._total or "eval/loss" in metrics:
            return True
        return self._every > 0 and step - self._row_step >= self._every


class Silent:
    """A view that shows nothing: of a process beside the one that is looked at."""

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        pass

    def say(self, text: str) -> None:
        pass


class Rate:
    """Steps per second: all of the run at first, later mostly the recent past."""

    def __init__(self) -> None:
        self._last: tuple[int, float] | None = None  # none before the first update: compilation is not pace
        self._steps = self._seconds = 0.0

    def add(self, step: int) -> None:
        """Comes to a step; going back to an earlier one is no pace."""
        now = time.monotonic()
        if self._last and step >= self._last[0]:
            seconds = now - self._last[1]
            keep = math.exp(-seconds / _MEMORY)
            self._steps = self._steps * keep + step - self._last[0]
            self._seconds = self._seconds * keep + seconds
        self._last = step, now

    def seconds_for(self, steps: int) -> float | None:
        """Time that so many more steps take; None for none, or while the pace is unknown."""
        if steps <= 0 or not self._steps or not self._seconds:
            return None
        return steps * self._seconds / self._steps


def on_terminal() -> bool:
    """Whether stderr can show a bar."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def say(shown: rich.progress.Progress | None, text: str) -> None:
    """Prints a line on stderr, above what is shown there. That no one can read it any more ends no run."""
    with contextlib.suppress(OSError):
        if shown:
            shown.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)


def bar() -> rich.progress.Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    return Progress(
        TextColumn("step {task.completed}/{task.total}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
        TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True)),
        console=Console(stderr=True),
        expand=True,
        refresh_per_second=4,
        redirect_stdout=sys.stdout.isatty(),  # what is piped elsewhere must arrive there, not above the bar
    )


def _figures(metrics: Mapping[str, float], seconds_left: float | None) -> str:
    shown = {
        "train/loss": "loss {:.4f}",
        "eval/loss": "eval {:.4f}",
        "throughput/tokens_per_second": "{:,.0f} tokens/s",
    }
    parts = [words.format(metrics[name]) for name, words in shown.items() if name in metrics]
    if seconds_left is not None:
        parts.append(f"{duration(seconds_left)} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """12s, 3m 05s, 2h 14m, 3d 04h: the two largest units."""
    minutes, s = divmod(max(round(seconds), 1), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02}h"
    if hours:
        return f"{hours}h {m:02}m"
    return f"{m}m {s:02}s" if m else f"{s}s"
