"""Runs a study: its trials, found again by the hash of their configs, and then its report.

workdir/study.json  trials/<address>/...  report.md  report.html  results.csv  ...
"""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import FrozenConfigDict

from jaxlm import files, redact
from jaxlm.ablation import findings, methods, outcomes, plan, preview, report, tuning
from jaxlm.ablation import lanes as side_by_side
from jaxlm.ablation.findings import Findings
from jaxlm.ablation.memory import Memory
from jaxlm.ablation.outcomes import Outcome
from jaxlm.ablation.points import Overrides
from jaxlm.ablation.study import Study, Trial, naming
from jaxlm.ablation.variants import written
from jaxlm.errors import INTERRUPTED, ConfigError, DataError, JaxlmError
from jaxlm.telemetry.board import Board
from jaxlm.training import lock, rundir
from jaxlm.training.prepare import Prepared, prepare
from jaxlm.training.signals import Signals

TRIALS = "trials"
"""In a study's directory: the run directories of its trials."""


class Stopped(JaxlmError):
    """A signal asked to stop; what was trained is saved."""

    def __init__(self, exit_code: int):
        super().__init__(f"{'interrupted' if exit_code == INTERRUPTED else 'preempted'}; run the same command to go on")
        self.exit_code = exit_code


class Group(NamedTuple):
    """Trials that one program trains, so many at once."""

    trials: list[Trial]
    lanes: int

    def parts(self) -> list[Group]:
        """Those that are trained at once, after one another."""
        return [Group(self.trials[i : i + self.lanes], self.lanes) for i in range(0, len(self.trials), self.lanes)]


Execute = Callable[[Sequence[Group], Path, Board, Signals], None]
"""Trains the trials of groups, each in its `folder`. Raises `Stopped` where a signal ends it."""


def run(
    study: Study, workdir: str | Path, *, name: str = "study", command: str = "", execute: Execute | None = None
) -> Findings:
    """Trains what a study still lacks, and writes its report.

    A trial that is over is not run again, one that was broken off goes on; so the same call, after whatever happened,
    ends with the same report.

    Args:
      workdir: the study's directory.
      name: for the report, as that of the study's file.
      command: for the report: what runs it again.
      execute: where trials are trained; None: here, one group after another (`local`).

    Raises:
      ConfigError: the study, or the config of a variant, is wrong; or the first trial that is over lacks the metric.
      DataError: data is missing or broken, or is not what it was when a trial was trained; the directory can't be
        written, or another process runs the study in it.
      Stopped: by a signal; the same call goes on.
    """
    workdir = files.expanded(workdir)
    with Signals() as signals, held(workdir):
        memory = Memory(workdir / rundir.STUDY)

        def train_all(trials: Sequence[Trial]) -> list[Outcome]:
            return train(
                trials, workdir, memory, signals, study.metric, study.score, lanes=study.lanes, execute=execute
            )

        def arm(variant: str, point: Overrides | None = None) -> FrozenConfigDict:
            return plan.budgeted(study, variant, point, memory)

        untuned = {variant: arm(variant) for variant in study.variants}
        warnings = preview.doubts(study, untuned, memory)
        known = plan.known_trials(study, arm)
        plan.check(study, arm, known)
        edited = memory.note(known)
        for line in [*warnings, *edited]:  # the report, which a second call writes too, has no word of an edit
            say(f"warning: {line}")
        chosen = tuning.choose(study, arm, train_all, workdir)
        for line in chosen.warnings:
            say(f"warning: {line}")
        trials = plan.compared_trials(study, arm, chosen.points)
        arms = {variant: arm(variant, chosen.points.get(variant)) for variant in study.variants}
        changed = memory.design(untuned, study.seeds, trials, lambda address: outcomes.over(workdir / TRIALS / address))
        for line in changed:
            say(f"warning: {line}")
        trained = [*chosen.outcomes, *train_all(trials)]
        warnings += [*chosen.warnings, *changed, *(late := _late(study, trained))]
        for line in late:
            say(f"warning: {line}")
        found = findings.gather(study, arms, chosen.points, trained, warnings, name=name, command=command)
        written = report.write(found, workdir)
    say(found.verdict)
    say(f"report: {', '.join(str(path) for path in written if path.suffix in ('.md', '.html'))}")
    return found


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """A directory of trials, locked.

    Raises:
      ConfigError: a run lives there.
      DataError: as `lock.held`.
    """
    if (workdir / "config.json").exists():
        raise ConfigError(f"{workdir} is a run's directory, and its trials need one of their own: another --workdir")
    with lock.held(workdir):
        yield


def _late(study: Study, trained: Sequence[Outcome]) -> list[str]:
    """Where arms took other times than a budget in seconds, for which steps were timed before."""
    if not study.budget or "seconds" not in study.budget:
        return []
    budget, listed = study.budget["seconds"], []
    for variant in study.variants:
        ended = [one for one in trained if one.variant == variant and not one.tuning and one.status == "done"]
        if ended and abs(off := statistics.median(one.seconds for one in ended) / budget - 1) > 0.1:
            listed.append(f"{variant} {budget * (1 + off):.3g} ({off:+.0%})")
    said = f"the budget is {budget:g} seconds a trial, by steps timed before, and the median trial took others"
    return [f"{said}: {', '.join(listed)}"] if listed else []


def train(
    trials: Sequence[Trial],
    workdir: Path,
    memory: Memory,
    signals: Signals,
    metric: str,
    score: str = "final",
    *,
    lanes: int = 0,
    execute: Execute | None = None,
) -> list[Outcome]:
    """Trains those of some trials that are not over; what all of them gave, in their order.

    Args:
      workdir: each trial has its `folder` there.
      score: see `scoring.judge`.
      lanes: runs at once; 0: as many as are fastest, see `grouped`.

    Raises:
      as `run`.
    """
    runs = {one.address: one for one in reversed(trials)}  # variants may be alike: by the first of them
    over = {key for key, one in runs.items() if outcomes.over(folder(workdir, one))}
    waiting = {key: one for key, one in reversed(runs.items()) if key not in over}
    _check_over([runs[key] for key in runs if key in over], workdir, metric)
    if waiting:
        say(f"{len(runs)} runs, of which {len(over)} are over")
        steps = sum(one.config.steps for one in waiting.values())
        with Board(len(waiting), steps, metric) as board:
            groups = grouped(list(waiting.values()), trials, lanes, memory, board.say)
            (execute or local)(groups, workdir, board, signals)
    return [outcomes.read(one, folder(workdir, one), metric, score) for one in trials]


def _check_over(trials: Sequence[Trial], workdir: Path, metric: str) -> None:
    """Of trials that are over, before others are trained: each has the metric, and its data is what it was.

    Raises:
      ConfigError: one has no such metric.
      DataError: of one, the data gives other tokens now.
    """
    known: dict[Hashable, dict[str, str]] = {}  # what data gives takes reading all of it
    for one in trials:
        outcomes.read(one, folder(workdir, one), metric)
        cfg, noted = one.config, outcomes.note(folder(workdir, one)).get("tokens", {})
        key = (cfg.init_from, cfg.data)
        if key not in known:
            with contextlib.suppress(DataError):  # it is not there: its trials are over, and those to come will say so
                known[key] = _tokens(prepare(cfg))
        found = known.get(key, noted)
        if changed := [split for split in noted if noted[split] != found.get(split)]:
            raise DataError(
                f"{one.title} is over, and its data (data.source={cfg.data.source!r}, data.validation="
                f"{cfg.data.validation!r}) changed since: the {' and '.join(changed)} tokens are others now, and "
                "trials on them can't be compared with it; give another --workdir, or the data that it began with"
            )


def _tokens(prepared: Prepared) -> dict[str, str]:
    """The sha256 of each split of a run's data, by which a trial that is over knows it again."""
    _, train, validation = prepared.data
    return {"training": train.sha256} | ({"validation": validation.sha256} if validation else {})


def folder(workdir: Path, trial: Trial) -> Path:
    """The run directory of a trial."""
    return workdir / TRIALS / trial.address


def grouped(
    waiting: Sequence[Trial], trials: Sequence[Trial], width: int, memory: Memory, say: Callable[[str], None]
) -> list[Group]:
    """The trials that wait, by the program that trains them.

    Args:
      trials: all of them; those of a program decide how many lanes it has, since a lane's last bits depend on that.
      width: the lanes of each program; 0: decided once for all models and batches of a shape, by timing the first
        program of it, and kept in `memory`.
    """
    keys = {one.address: plan.program(one) for one in trials}
    groups: dict[Hashable, list[Trial]] = {}
    for one in waiting:
        groups.setdefault(keys[one.address], []).append(one)
    out = []
    for key, members in groups.items():
        digest, shape = side_by_side.digest(key), side_by_side.digest(side_by_side.shape(members[0].config))
        if not width and digest not in memory.lanes:
            fellows = {one.address: prepare(one.config) for one in trials if keys[one.address] == key}
            if shape not in memory.lanes:
                memory.lanes[shape] = side_by_side.choose(list(fellows.values()), say)
            memory.lanes[digest] = side_by_side.even(len(fellows), memory.lanes[shape])
            memory.write()
        out.append(Group(members, width or memory.lanes[digest]))
    return out


def local(groups: Sequence[Group], workdir: Path, board: Board, signals: Signals) -> None:
    """One group after another, in this process; lanes are divided over its devices."""
    for group in groups:
        train_group(group, workdir, board, signals)


def train_group(group: Group, workdir: Path, board: Board, signals: Signals) -> None:
    """Trains the trials of a group, as many at once as it has lanes.

    Raises:
      Stopped: by a signal.
      ConfigError, DataError: as `loop.train`; or a trial that is over has no metric of the board's name.
    """
    for part in group.parts():
        members = []
        with naming(*dict.fromkeys(one.variant for one in part.trials)):
            for one in part.trials:
                where = folder(workdir, one)
                where.mkdir(parents=True, exist_ok=True)
                prepared = prepare(one.config)
                note = {"variant": one.variant, "seed": one.seed, "tuning": one.tuning, "point": written(one.point)}
                note |= {"beside": len(part.trials), "tokens": _tokens(prepared), "machine": methods.machine()}
                with files.atomic(where / outcomes.TRIAL) as file:
                    file.write(json.dumps(note).encode())
                view = functools.partial(board.lane, one.title, one.config.steps)
                members.append(side_by_side.Member(prepared, where, view))
            side_by_side.train(members, part.lanes, signals)
        if signals.caught:
            raise Stopped(signals.exit_code)
        for one in part.trials:
            outcomes.read(one, folder(workdir, one), board.metric)  # what this one lacks, none will have


def say(text: str) -> None:
    """A line for people."""
    print(redact.text(text), file=sys.stderr, flush=True)
