"""The one impure loop: data in; steps, metrics and checkpoints out."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm import data, redact, tree
from jaxlm.errors import DataError, DivergedError
from jaxlm.evals import perplexity
from jaxlm.optim.wrappers import evaluation_params
from jaxlm.telemetry import curves
from jaxlm.telemetry.flops import flops_per_token
from jaxlm.telemetry.progress import Progress
from jaxlm.telemetry.writers import open_writers
from jaxlm.training import initial, lock, memory, parallel, position, rundir, step
from jaxlm.training.checkpoint import Checkpoints
from jaxlm.training.prepare import prepare
from jaxlm.training.recorder import Recorder, Spike
from jaxlm.training.signals import Signals
from jaxlm.training.step import State


class Result(NamedTuple):
    status: str  # "done", "stopped early", "preempted" or "interrupted"
    exit_code: int  # 0, 0, 75 or 130
    state: State
    metrics: dict[str, float]  # of the last evaluation; empty where there was none
    workdir: Path


def train(cfg: ConfigDict | FrozenConfigDict, workdir: str | Path) -> Result:
    """Trains as the config says, in a run directory; goes on from its latest checkpoint if there is one.

    Args:
      cfg: complete, from `jaxlm.config.default()` or a file of `configs/`.
      workdir: the run directory.

    Returns:
      the final state, after an early stop the best one, and the metrics of the last evaluation. Where `exit_code` is
      75 (SIGTERM) or 130 (SIGINT), the run goes on when called again.

    Raises:
      ConfigError: the config is wrong, or another run lives in `workdir`.
      DataError: data is missing or broken, or the run directory can't be written.
      DivergedError: the loss became non-finite; the checkpoints from before are kept.
    """
    workdir = Path(workdir)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals())
        cfg, opened, source = prepare(cfg)
        stack.enter_context(memory.explained(cfg))
        first: step.PyTree | None = None
        told: list[str] = []
        if source:
            with Checkpoints(workdir / "checkpoints", writable=False) as before:
                if before.whole() is None:  # read them before anything is written: they may be damaged
                    first, told = initial.params(cfg, source, opened.tokenizer)
        told += step.doubts(cfg)
        stack.enter_context(lock.held(workdir))
        told += rundir.prepare(workdir, cfg, opened.tokenizer)
        keep, best = cfg.checkpoint.keep, cfg.checkpoint.best
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", keep=keep, best=best))
        run = _Run(cfg, workdir, opened, checkpoints, signals, first)
        del first
        status = "failed"
        stack.callback(lambda: rundir.write_status(workdir, status, run.done))
        progress = Progress(cfg.steps, run.done, cfg.log.progress, every=cfg.log.every)
        log = stack.enter_context((workdir / "log.txt").open("a", encoding="utf-8"))
        stack.enter_context(progress)

        def say(text: str) -> None:
            text = redact.text(text)
            progress.say(text)
            print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=log, flush=True)

        rundir.write_status(workdir, "running", run.done)
        for line in [*told, *checkpoints.tell()]:
            say(line)
        try:
            ended = ""
            while not ended:
                try:
                    with open_writers(cfg.log.writers, workdir, cfg, run.done) as writers:
                        ended = run.go(run.recorder(writers, progress, say), say)
                except Spike as spike:
                    run.roll_back(spike, say)
            checkpoints.wait()
            status = ended
        except DivergedError:
            status = "diverged"
            raise
        if status == "stopped early":
            run.return_to_best(say)
        if curve := curves.draw(workdir):
            say(f"loss curve: {curve}")
        exit_code = signals.exit_code if signals.caught else 0
        return Result(status, exit_code, run.state, run.metrics, workdir)


class _Run:
    """A run in progress: its state, where its data stands, and what may be done with them."""

    def __init__(
        self,
        cfg: FrozenConfigDict,
        workdir: Path,
        opened: data.Data,
        checkpoints: Checkpoints,
        signals: Signals,
        params: step.PyTree | None,
    ):
        self.cfg, self.workdir, self.checkpoints, self.signals = cfg, workdir, checkpoints, signals
        self.mesh = parallel.mesh(cfg.parallel, cfg.data.batch_size, cfg.data.micro_batches)
        structure, self.hparams = step.split(cfg)
        program = step.build(structure)
        self.one = parallel.compile(program.train_step, self.mesh, donate=(1,))
        self.many = parallel.compile(parallel.repeat(program.train_step), self.mesh, donate=(1,))
        T = cfg.model.context_length
        self.batches = data.Batches(opened.train.tokens, cfg.data.batch_size, T, cfg.seed)
        self.validation = None
        if opened.validation is not None and cfg.eval.every:
            self.validation = data.evaluation(opened.validation.tokens, cfg.data.batch_size, T, cfg.eval.batches)
            self.bytes_per_token = opened.validation.num_bytes / opened.validation.num_tokens
        self.metrics: dict[str, float] = {}

        init = parallel.compile(program.init, self.mesh)
        key = jax.random.key(cfg.seed)
        shapes = jax.eval_shape(program.init, key, self.hparams)
        self.like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=parallel.replicated(self.mesh)), shapes
        )
        self.eval_steps = {
            name: parallel.compile(functools.partial(program.eval_step, of=name), self.mesh)
            for name in jax.eval_shape(evaluation_params, shapes.opt_state, shapes.params)
        }
        self.position = position.Position(0, opened.train.sha256)
        if (latest := checkpoints.whole()) is not None:
            restored = checkpoints.restore(self.like, latest)
            rundir.check(restored.config, cfg, f"checkpoint {latest} in {str(workdir)!r}")
            self.state = restored.state
            self.position = position.of_json(restored.data)
            if self.position.tokens != opened.train.sha256:
                raise DataError(
                    f"the training tokens of data.source={cfg.data.source!r} are not those that the run in "
                    f"{workdir} began with; give another --workdir, or the data that it began with"
                )
        else:
            self.state = init(key, self.hparams, jax.device_put(params, parallel.replicated(self.mesh)))
        self.done = self.started = int(self.state.step)

    def recorder(self, writers: Any, progress: Progress, say: Callable[[str], None]) -> Recorder:
        model, T = self.cfg.model, self.cfg.model.context_length
        return Recorder(
            writers,
            progress,
            say,
            every=self.cfg.log.every,
            tokens_per_step=self.cfg.data.batch_size * T,
            tokens_before=self.position.sequences * T,
            position=self.position,
            divergence=self.cfg.divergence,
            flops_per_token=flops_per_token(tree.matmul_size(self.state.params), model.num_layers, T, model.embed_dim),
            dtype=model.dtype,
        )

    def go(self, recorder: Recorder, say: Callable[[str], None]) -> str:
        """Trains to the end, or to the first reason to stop; returns the status."""
        cfg = self.cfg
        say(self.describe())
        if self.done >= cfg.steps:
            say(f"already at step {self.done} of {cfg.steps}; raise --config.steps to go on")
            return "done"
        self.signals.stepping = True
        compiled: set[int] = set()
        plan = position.calls(self.done, cfg)
        with data.prefetch(lambda i: self.batch(*plan[i]), 0, len(plan)) as batches:
            for (first, count), batch in zip(plan, batches, strict=True):
                begin = time.perf_counter()
                advance = self.one if count == 1 else self.many
                self.state, metrics = advance(self.hparams, self.state, batch)
                if count not in compiled:
                    compiled.add(count)
                    say(f"compiled the step in {time.perf_counter() - begin:.1f} s")
                recorder.take(first, count, metrics)
                self.done = first + count
                if status := self.between_steps(recorder, say):
                    return status
        return "done"

    def between_steps(self, recorder: Recorder, say: Callable[[str], None]) -> str:
        """Evaluates and saves where it is time to; returns why to stop, or ""."""
        cfg, done = self.cfg, self.done
        last = done == cfg.steps

        def due(every: int) -> bool:
            return every > 0 and (last or done % every == 0)

        if self.checkpoints.done():
            self.saving(self.checkpoints.wait, say)
        evaluate, save, stop = due(cfg.eval.every) and self.validation, due(cfg.checkpoint.every), ""
        if not (self.signals.heard() or evaluate or save or last):
            return ""
        recorder.flush()
        metrics: dict[str, float] = {}
        if evaluate:
            metrics = self.metrics = self.evaluate()
            if (mean := recorder.mean_loss()) is not None:
                metrics["eval/gap"] = metrics["eval/loss"] - mean
            recorder.write(done, metrics)
            best, patience = self.position.best, self.position.patience
            if (value := metrics.get(cfg.checkpoint.best)) is not None:
                best = best.seen(value, done)
                save = save or (best.stale == 0 and cfg.checkpoint.every > 0)
            if (value := metrics.get(cfg.early_stopping.metric)) is not None:
                patience = patience.seen(value, done, cfg.early_stopping.min_delta)
                if 0 < cfg.early_stopping.patience <= patience.stale:
                    stop = "stopped early"
                    say(f"stopped early: {cfg.early_stopping.metric} has not improved on {patience.value:.4f}")
            self.position = self.position._replace(best=best, patience=patience)
        if self.signals.caught:
            save, stop = True, "interrupted" if self.signals.exit_code == 130 else "preempted"
            say(f"{self.signals.caught.name} at step {done}: saving; run the same command again to go on")
        if save or (stop and cfg.checkpoint.every):
            self.saving(self.checkpoints.wait, say)
            now = self.position._replace(
                sequences=self.sequences(done),
                losses=recorder.losses,
                skipped=recorder.skipped,
                recent=recorder.recent,
            )
            save_now = functools.partial(self.checkpoints.save, self.state, now._asdict(), cfg, metrics)
            self.saving(save_now, say, final=last or bool(stop))
            rundir.write_status(self.workdir, "running", done)
        return stop

    def saving(self, act: Callable[[], None], say: Callable[[str], None], final: bool = False) -> None:
        """Does a part of a save. A failure is said, and raised where it is one too many or no save comes after it."""
        try:
            act()
        except DataError as error:
            if final or self.checkpoints.failures >= self.cfg.checkpoint.max_failures:
                raise
            say(f"warning: {error}")

    def sequences(self, now: int) -> int:
        """Training sequences seen at a step: those before it started, and a batch a step since."""
        return self.position.sequences + (now - self.started) * self.cfg.data.batch_size

    def batch(self, first: int, count: int) -> dict[str, jax.Array]:
        """The batch of a call, on the devices: [B, T], or [count, B, T]."""
        B = self.cfg.data.batch_size
        rows = self.batches.rows(self.sequences(first), count * B)
        if count > 1:
            rows = {name: x.reshape(count, B, -1) for name, x in rows.items()}
        return parallel.put(rows, self.mesh)

    def evaluate(self) -> dict[str, float]:
        """eval/loss, ...; and eval/ema_loss, ... where the optimizer keeps an average beside the parameters."""
        assert self.validation is not None
        out: dict[str, float] = {}
        for name, eval_step in self.eval_steps.items():
            batches: Iterator[dict[str, jax.Array]] = (parallel.put(batch, self.mesh) for batch in self.validation)
            sums = functools.partial(eval_step, self.state)
            found = perplexity.evaluate(sums, batches, bytes_per_token=self.bytes_per_token)
            out |= {key.replace("/", f"/{name}_") if name else key: value for key, value in found.items()}
        return out

    def roll_back(self, spike: Spike, say: Callable[[str], None]) -> None:
        """To the latest checkpoint, from where the batches after the spike's come next.

        Raises:
          DivergedError: there is no checkpoint, or that happened too often.
        """
        self.saving(self.checkpoints.wait, say)
        latest = self.checkpoints.whole()
        for line in self.checkpoints.tell():
            say(line)
        if latest is None or self.position.rollbacks >= self.cfg.divergence.max_rollbacks:
            times = f"after {self.position.rollbacks} rollbacks (divergence.max_rollbacks)"
            raise DivergedError(f"{spike}, {'with no checkpoint to go back to' if latest is None else times}")
        past, rollbacks = self.sequences(spike.step), self.position.rollbacks + 1
        restored = self.checkpoints.restore(self.like, latest)
        self.state, self.done, self.started = restored.state, latest, latest
        self.position = position.of_json(restored.data)._replace(sequences=past, rollbacks=rollbacks)
        say(f"warning: {spike}; back to step {latest}, to go on with sequence {past:,}")

    def return_to_best(self, say: Callable[[str], None]) -> None:
        """After an early stop: the state of the best checkpoint, if one was kept."""
        best = self.position.best
        self.checkpoints.wait()
        if best.step in self.checkpoints.steps():
            self.checkpoints.whole(best.step)
            self.state = self.checkpoints.restore(self.like, best.step).state
            say(f"back to the best: step {best.step}, with {self.cfg.checkpoint.best} {best.value:.4f}")

    def describe(self) -> str:
        B, T = self.cfg.data.batch_size, self.cfg.model.context_length
        device = jax.devices()[0]
        epochs = self.cfg.steps * B / self.batches.num_windows
        resumed = f"; resumed at step {self.done}" if self.done else ""
        return (
            f"{tree.size(self.state.params):,} parameters, {self.batches.num_windows * T:,} training tokens, "
            f"{B * T:,} tokens a step, {epochs:.2g} epochs, {self.mesh.size} x {device.device_kind}{resumed}"
        )
