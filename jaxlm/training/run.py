"""A run in progress: its directory, where it stands, what is written there and why it ends. How it is stepped, alone
or beside others, is `loop`'s story."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
from ml_collections import FrozenConfigDict

from jaxlm import data, functions, redact, tree
from jaxlm.data.batches import Batch
from jaxlm.errors import DataError, DivergedError
from jaxlm.evals import perplexity
from jaxlm.model.losses import TokenSums
from jaxlm.optim import chain
from jaxlm.optim.wrappers import averages, evaluation_params
from jaxlm.telemetry import carbon, energy, flops
from jaxlm.telemetry.progress import View
from jaxlm.telemetry.share import Share
from jaxlm.telemetry.writers import METRICS, Writers, open_writers, read_jsonl
from jaxlm.training import devices, initial, lock, material, parallel, position, processes, rundir, sanity, step
from jaxlm.training.checkpoint import Checkpoints
from jaxlm.training.prepare import Prepared
from jaxlm.training.recorder import Recorder, Spike
from jaxlm.training.step import State
from jaxlm.training.steps import Steps

_OVER = ("done", "stopped early")


@contextlib.contextmanager
def open_run(
    prepared: Prepared,
    workdir: Path,
    steps: Steps,
    view: Callable[[int], contextlib.AbstractContextManager[View]],
    seen: Callable[[int, Batch], None] | None = None,
) -> Iterator[Run]:
    """The run of a directory, locked: at its latest checkpoint if it has one.

    Args:
      view: what shows it, from the steps that are complete.
      seen: as `loop.train` takes it.

    Raises:
      ConfigError, DataError: as `loop.train`.
    """
    cfg, opened, source = prepared
    with contextlib.ExitStack() as stack:
        first, told, latest = initial.Beginning(), list[str](), None
        if cfg.init_from:
            with Checkpoints(workdir / rundir.CHECKPOINTS, writable=False) as before:
                if (latest := before.whole()) is None:  # read them before anything is written: they may be damaged
                    named, tokens = source or initial.follow(cfg)[1], opened.train.sha256
                    first, told = initial.begin(cfg, named, opened.tokenizer, tokens, steps.like)
        told += [*sanity.check(cfg), *devices.remarks(cfg)]
        if cfg.early_stopping.patience and not (cfg.eval.every and cfg.data.validation):
            told.append("warning: early_stopping stops nothing without evaluations: set eval.every and data.validation")
        elif position.may_be_best(cfg) and not cfg.checkpoint.every:
            told.append("warning: early_stopping returns to no best step without checkpoints: set checkpoint.every")
        writes = processes.first()
        if writes:
            stack.enter_context(lock.held(workdir))
        told += processes.first_does(lambda: rundir.prepare(workdir, cfg, opened.tokenizer))
        if not (workdir / "config.json").exists():
            raise DataError(f"--workdir={workdir} is not on a file system that all processes share; give one that is")
        keep, best = cfg.checkpoint.keep, cfg.checkpoint.best
        checkpoints = stack.enter_context(Checkpoints(workdir / rundir.CHECKPOINTS, keep=keep, best=best))
        run = Run(cfg, workdir, opened, checkpoints, steps, first, seen, latest)
        del first
        run.log = stack.enter_context((workdir / "log.txt" if writes else Path(os.devnull)).open("a", encoding="utf-8"))
        run.view = stack.enter_context(view(run.done))
        stack.callback(lambda: run.status(run.ended or "failed"))
        stack.callback(lambda: run.writers.close())
        run.status("running")
        for line in [*told, *run.remarks, *checkpoints.tell()]:
            run.say(line)
        try:
            yield run
        except (KeyboardInterrupt, SystemExit) as error:  # a signal, while there was no step to finish
            run.ended = run.ended or ("interrupted" if isinstance(error, KeyboardInterrupt) else "preempted")
            raise


class Run:
    """See `open_run`.

    Attributes:
      state: where it stands, while it is not stepped.
      done: completed steps.
      ended: why it stopped: "done", "stopped early", "preempted", "interrupted", "diverged"; "" while it goes on.
      error: of a run that diverged.
      metrics: of the last evaluation.
      remarks: on how it goes on, to be said.
    """

    log: TextIO
    view: View

    def __init__(
        self,
        cfg: FrozenConfigDict,
        workdir: Path,
        opened: data.Data,
        checkpoints: Checkpoints,
        steps: Steps,
        first: initial.Beginning,
        seen: Callable[[int, Batch], None] | None,
        latest: int | None,  # the checkpoint that was found whole just now, if one was looked for
    ):
        self.cfg, self.workdir, self._checkpoints, self._like = cfg, workdir, checkpoints, steps.like
        self._seen = seen
        _, self.hparams = step.split(cfg)
        self._carbon = carbon.intensity(cfg.log.carbon_intensity)
        self._material = material.of(cfg, opened)
        self.validation = self._material.validation
        self.ended = ""
        self.error: DivergedError | None = None
        self.metrics: dict[str, float] = {}
        self.writers = Writers({}, self.say)
        code, tokens, held_out = functions.digests(cfg), self._material.tokens, self._material.held_out
        self._position = position.Position(0, tokens, validation=held_out, code=code)
        self.remarks: list[str] = []
        self.state: State | None
        if not processes.first_does(lambda: latest in checkpoints.steps()[-1:]):
            latest = checkpoints.whole()
        if latest is not None:
            restored = checkpoints.restore(self._like, latest)
            rundir.check(restored.config, cfg, f"checkpoint {latest} in {str(workdir)!r}")
            self.state = restored.state
            before = position.of_json(restored.data)
            count = chain.schedule_count(self.state.opt_state, self.state.step)
            self.remarks = rundir.edits(before.code, restored.config, cfg)
            self.remarks += position.moved_rates(cfg, restored.config.steps, count, latest)
            self._position = before._replace(validation=held_out, code=code)
            if self._position.tokens != tokens:
                raise DataError(
                    f"the training tokens of data.source={cfg.data.source!r} are not those that the run in "
                    f"{workdir} began with; give another --workdir, or the data that it began with"
                )
        else:
            self.state = first.state or steps.init(cfg.seed, self.hparams, first.params)
            self._position = self._position._replace(sequences=first.sequences)
            if rows := self._rows():
                self.remarks = [f"no checkpoint to go on from: it begins anew, without the {len(rows)} rows of metrics"]
        self.done = self._started = int(self.state.step)

    def status(self, status: str) -> None:
        """Writes status.json; of several processes one does. What it says is no reason to end a run."""
        if processes.first():
            try:
                rundir.write_status(self.workdir, status, self.done, self._result if status in _OVER else None)
            except DataError as error:
                self.say(f"warning: {error}")

    def say(self, text: str) -> None:
        """A line for people, and for log.txt."""
        text = redact.text(text)
        self.view.say(text)
        with contextlib.suppress(OSError):  # a full disk
            print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=self.log, flush=True)

    def begin(self, where: str, meter: energy.Meter | None, devices: int, runs: Callable[[], int]) -> State:
        """Opens what the metrics of the steps to come are written to; gives up the state.

        Args:
          where: it is stepped, in words.
          meter: of the energy, if it is measured.
          devices: at work on the calls.
          runs: how many go on in the same calls.
        """
        assert self.state is not None
        cfg, model, T, params = self.cfg, self.cfg.model, self.cfg.model.context_length, self.state.params
        self.writers.close()
        names = cfg.log.writers if processes.first() else ()
        self.writers = open_writers(names, self.workdir, cfg, self.done, self.say)
        self._energy = Share(meter, runs, self._position.joules, self._carbon)
        self.recorder = Recorder(
            cfg,
            self._position,
            self.writers,
            self.view,
            self.say,
            flops_per_token=flops.of_model(model, params),
            devices=lambda: devices / max(1, runs()),
            energy=self._energy,
        )
        rows = self._material.batches.num_rows
        epoch = rows / cfg.data.batch_size  # in steps
        epochs = f"{cfg.steps / epoch:.2g} epochs of {epoch:,.1f} steps"
        resumed = f"; resumed at step {self.done}" if self.done else ""
        self.say(
            f"{tree.size(params) - flops.padding(params, model.vocab_size):,} parameters, "
            f"{rows * T:,} training tokens, {cfg.data.batch_size * T:,} tokens a step, {epochs}, {where}{resumed}"
        )
        for line in self._material.said:
            self.say(line)
        if stale := position.stale(self._position, cfg):
            self.say(f"stopped early at step {self.done}: {stale}; raise --config.early_stopping.patience to go on")
            self.ended = "stopped early"
        elif self.done >= cfg.steps:
            self.say(f"already at step {self.done} of {cfg.steps}; raise --config.steps to go on")
            self.ended = "done"
        if self.ended:
            self.metrics = self._last_evaluation()
        state, self.state = self.state, None
        return state

    def _comes(self) -> tuple[bool, bool]:
        """Whether it is time to evaluate, and whether to save."""
        evaluates, saves = (
            every > 0 and (self.done == self.cfg.steps or self.done % every == 0)
            for every in (self.cfg.eval.every, self.cfg.checkpoint.every)
        )
        return bool(self.validation) and evaluates, saves

    def due(self, caught: signal.Signals | None) -> bool:
        """Whether something else than steps comes next."""
        return any(self._comes()) or self.done == self.cfg.steps or caught is not None

    def take(self, first: int, count: int, fetch: Callable[[], dict[str, np.ndarray]]) -> None:
        """Notes that so many steps are under way, and the metrics of those before."""
        with self._diverging():
            self.recorder.take(first, count, fetch)
        self.done = first + count

    def pause(self) -> None:
        """Something else than steps comes next: their metrics are written, and their clock stands still."""
        with self._diverging():
            self.recorder.flush()

    def between_steps(
        self, evaluate: Callable[[], dict[str, TokenSums]], state: Callable[[], State], caught: signal.Signals | None
    ) -> None:
        """Evaluates and saves where it is time to; ends the run where there is a reason to. It has been paused where
        something is `due`.

        Args:
          evaluate: gives the sums over the validation batches, as `Steps.evaluate` does.
          state: gives the state now.
          caught: the signal that asks to stop.
        """
        cfg, done, last = self.cfg, self.done, self.done == self.cfg.steps
        if self._checkpoints.done():
            self._saving(self._checkpoints.wait)
        if not self.due(caught):
            return
        evaluates, save = self._comes()
        stop = ""
        metrics: dict[str, float] = {}
        if evaluates:
            try:
                metrics, stale = self._evaluate(evaluate(), state)
            except Exception:  # what a task or a judge can't do is no reason to lose the steps
                if save or (cfg.checkpoint.every and processes.count() == 1):  # others may not be here
                    self._save(state(), {}, final=True)
                raise
            save = save or bool(cfg.checkpoint.best and cfg.checkpoint.every and self._position.best.step == done)
            if stale:
                stop = "stopped early"
                self.say(f"stopped early: {stale}")
        if caught and not (stop or last):
            save, stop = True, "interrupted" if caught == signal.SIGINT else "preempted"
            self.say(f"{caught.name} at step {done}: saving; run the same command again to go on")
        if save or ((stop or last) and (cfg.checkpoint.every or self._checkpoints.steps())):
            self._save(state(), metrics, final=last or bool(stop))
        if stop or last:
            self.ended = stop or "done"

    def _evaluate(self, sums: dict[str, TokenSums], state: Callable[[], State]) -> tuple[dict[str, float], str]:
        """The metrics of an evaluation, written; and why the run is to stop early, in words, "" where it is not."""
        metrics = self.metrics = perplexity.of_all(sums, self._material.bytes_per_token)
        gap = {} if (mean := self.recorder.mean_loss()) is None else {"eval/gap": metrics["eval/loss"] - mean}
        try:
            if ask := self._material.ask:
                asked = state()
                metrics |= ask(parallel.here(evaluation_params(asked.opt_state, asked.params)[""]), metrics)
        finally:
            metrics |= gap
            self.recorder.write(self.done, metrics)
        judges = {"eval/gap": math.nan} | metrics  # where the steps that it is of were skipped
        self._position, stale = position.judged(self._position, self.cfg, judges, self.done)
        return metrics, stale

    def _save(self, state: State, metrics: dict[str, float], final: bool) -> None:
        """Of a state at `done`, and the metrics of its evaluation, if there was one."""
        self._saving(self._checkpoints.wait)
        recorder = self.recorder
        now = self._position._replace(
            sequences=self._sequences(self.done),
            losses=recorder.losses,
            skipped=recorder.skipped,
            recent=recorder.recent,
            joules=self._energy.total(),
        )
        save_now = functools.partial(self._checkpoints.save, state, now._asdict(), self.cfg, metrics)
        self._saving(save_now, final=final)
        self.status("running")

    def left_behind(self) -> None:
        """It has ended, and runs beside it go on: what they use is not its own."""
        self._energy.close()

    def settle(self) -> None:
        """Once it has ended: waits until all that was saved is whole."""
        try:
            self._checkpoints.wait()
        except BaseException:
            self.ended = ""  # which `open_run` takes for a failure
            raise
        if joules := self._energy.total():
            grams = "" if self._carbon is None else f", {joules / energy.JOULES_PER_KWH * self._carbon:.3g} gCO2e"
            self.say(f"used {joules:,.4g} J, {joules / energy.JOULES_PER_KWH:.3g} kWh{grams}")

    @contextlib.contextmanager
    def _diverging(self) -> Iterator[None]:
        try:
            yield
        except DivergedError as error:
            self.ended, self.error = "diverged", error

    def _saving(self, act: Callable[[], None], final: bool = False) -> None:
        """Does a part of a save. A failure is said, and raised where it is one too many or no save comes after it."""
        try:
            act()
        except DataError as error:
            several = processes.count() > 1  # which must all do the same next
            if final or several or self._checkpoints.failures >= self.cfg.checkpoint.max_failures:
                raise
            self.say(f"warning: {error}")

    def _sequences(self, now: int) -> int:
        """Training sequences seen at a step: those before it started, and a batch a step since."""
        return self._position.sequences + (now - self._started) * self.cfg.data.batch_size

    def batch(self, first: int, count: int, rows: slice) -> Batch:
        """These rows of the batches of so many steps: [count, rows, T]."""
        begin, size = self._sequences(first) + rows.start, rows.stop - rows.start
        B = self.cfg.data.batch_size
        spans = [(begin, count * B)] if size == B else [(begin + i * B, size) for i in range(count)]
        parts = [self._material.batches.rows(*span) for span in spans]
        if self._seen:
            for (start, _), part in zip(spans, parts, strict=True):
                self._seen(start, part)
        return {name: np.concatenate([part[name] for part in parts]).reshape(count, size, -1) for name in parts[0]}

    def _rows(self) -> list[dict[str, float]]:
        """Those of metrics.jsonl."""
        path = self.workdir / METRICS
        return read_jsonl(path) if path.exists() else []

    def _last_evaluation(self) -> dict[str, float]:
        """The metrics of the last one, as far as metrics.jsonl has them."""
        last: dict[str, float] = next((row for row in reversed(self._rows()) if "eval/loss" in row), {})
        return {name: value for name, value in last.items() if name.startswith("eval/")}

    def roll_back(self, spike: Spike) -> None:
        """To the latest checkpoint, from where the batches after the spike's come next; or it has diverged, where there
        is no checkpoint, or that happened too often."""
        self._saving(self._checkpoints.wait)
        latest = self._checkpoints.whole()
        for line in self._checkpoints.tell():
            self.say(line)
        with self._diverging():
            if latest is None or self._position.rollbacks >= self.cfg.divergence.max_rollbacks:
                times = f"after {self._position.rollbacks} rollbacks (divergence.max_rollbacks)"
                raise DivergedError(f"{spike}, {'with no checkpoint to go back to' if latest is None else times}")
            past, now = self._sequences(spike.step), self._position
            restored = self._checkpoints.restore(self._like, latest)
            self.state, self.done, self._started = restored.state, latest, latest
            self._position = position.of_json(restored.data)._replace(
                sequences=past,
                validation=now.validation,
                code=now.code,
                rollbacks=now.rollbacks + 1,
                joules=self._energy.total(),
            )
            self.say(f"warning: {spike}; back to step {latest}, to go on with sequence {past:,}")

    @property
    def _result(self) -> int | None:
        return position.result(self._position, self.cfg, self.done)

    def return_to_best(self) -> None:
        """At the end: says which step was the best. Where that is the result, takes its state, if it was kept."""
        best, result = self._position.best.of(self.cfg.checkpoint.best), self._result
        if self.ended not in _OVER:
            return
        if self.cfg.checkpoint.best and best.worth is not None:
            self.say(f"the best: step {best.step}, with {best.metric.removeprefix('-')} {best.worth:.4f}")
        for name in position.judging(self.cfg, averages(self._like.opt_state)):
            self.say(f"judged by an average: evaluate, generate and export take that with --weights={name}")
        if result in (None, self.done) or not processes.first_does(lambda: result in self._checkpoints.steps()):
            return
        self._checkpoints.whole(result)
        self.state = self._checkpoints.restore(self._like, result).state
        self.say(f"back to step {result}, whose parameters are the result")
