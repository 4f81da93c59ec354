"""What a person sees of many runs at once: a bar for all and one for each under way in a terminal; elsewhere a line as
each run ends. All on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from jaxlm.telemetry import progress

if TYPE_CHECKING:
    import rich.progress


class Board:
    """Shows runs that come and go.

    with Board(runs=12, steps=12_000) as board:
        with board.lane("lion seed=0", 1000, done=0) as view:
            view.update(10, {"train/loss": 3.21})

    Args:
      runs, steps: how many there are in all.
      metric: of which each run's latest value is shown.
    """

    def __init__(self, runs: int, steps: int, metric: str = "eval/loss"):
        self._runs, self._steps, self.metric = runs, steps, metric
        self._ended = self._stepped = self._computed = 0
        self._rate = progress.Rate()
        self.bar: rich.progress.Progress | None = None

    def __enter__(self) -> Board:
        if progress.on_terminal():
            self.bar = progress.bar()
            self._all = self.bar.add_task("", total=self._steps, figures=self._figures())
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None

    @contextlib.contextmanager
    def lane(self, title: str, steps: int, done: int) -> Iterator[_Lane]:
        """What shows a run of so many steps, from those that are done."""
        lane = _Lane(self, title, steps, done)
        try:
            yield lane
        finally:
            lane.close()
            self._ended += 1
            self.skip(steps - lane.step)  # one that ended early leaves none to wait for
            if not self.bar:
                progress.say(None, f"run {self._ended} of {self._runs}  {lane.line()}")

    def advance(self, steps: int) -> None:
        """Counts steps of any run, as they are computed."""
        self._computed += steps
        self._rate.add(self._computed)
        self.skip(steps)

    def skip(self, steps: int) -> None:
        """Counts steps that are not to be waited for, and tell nothing of the pace."""
        self._stepped += steps
        if self.bar:
            self.bar.update(self._all, completed=self._stepped, figures=self._figures())

    def say(self, text: str) -> None:
        """Prints a line, above the bars if there are any."""
        progress.say(self.bar, text)

    def _figures(self) -> str:
        left = self._rate.seconds_for(self._steps - self._stepped)
        return f"{self._ended} of {self._runs} runs" + (f"  {progress.duration(left)} left" if left else "")


class _Lane:
    def __init__(self, board: Board, title: str, steps: int, done: int):
        self._board, self._title, self._steps, self.step = board, title, steps, done
        self._latest: dict[str, float] = {}
        self._task = board.bar.add_task("", total=steps, completed=done, figures=title) if board.bar else None
        board.skip(done)

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        self._latest.update(metrics or {})
        self._board.advance(step - self.step)
        self.step = step
        if self._board.bar and self._task is not None:
            self._board.bar.update(self._task, completed=step, figures=f"{self._title}  {self._figures()}")

    def say(self, text: str) -> None:
        if text.startswith(("warning", "stopped early")):  # the rest is in the run's log.txt
            self._board.say(f"{self._title}: {text}")

    def line(self) -> str:
        return f"{self._title}: step {self.step} of {self._steps}  {self._figures()}".rstrip()

    def _figures(self) -> str:
        shown = dict.fromkeys(("train/loss", self._board.metric))
        return "  ".join(f"{name} {self._latest[name]:.4f}" for name in shown if name in self._latest)

    def close(self) -> None:
        if self._board.bar and self._task is not None:
            self._board.bar.remove_task(self._task)
