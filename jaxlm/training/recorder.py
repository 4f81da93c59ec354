"""Metrics on their way out: those of one call are fetched while the next one runs, so the device never waits."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from jaxlm.errors import DivergedError
from jaxlm.telemetry.flops import mfu
from jaxlm.telemetry.progress import View
from jaxlm.telemetry.share import Share
from jaxlm.telemetry.writers import Writers
from jaxlm.training.position import Position, before_evaluation


class Spike(Exception):
    """A loss far above those before it, at completed step `step`."""

    def __init__(self, step: int, loss: float):
        super().__init__(f"the loss of step {step} is a spike: {loss:.4g}")
        self.step = step


class Recorder:
    """Takes the metrics of each call of the step, writes every `log.every`-th step's as a row, and the last one's.

    Args:
      position: where the run stands; the recorder goes on with its `losses`, `skipped` and `recent`.
      say: takes a line for people.
      flops_per_token: of forward and backward pass, for the MFU.
      devices: what this run has of them: a part of one, where lanes share it.
      energy: what this run is charged.
    """

    def __init__(
        self,
        cfg: FrozenConfigDict,
        position: Position,
        writers: Writers,
        progress: View,
        say: Callable[[str], None],
        *,
        flops_per_token: int,
        devices: Callable[[], float],
        energy: Share,
    ):
        self._writers, self._progress, self._say = writers, progress, say
        self._every, self._last, self._divergence = cfg.log.every, cfg.steps, cfg.divergence
        self._near = before_evaluation(cfg)
        T = cfg.model.context_length
        self._tokens_per_step, self._tokens = cfg.data.batch_size * T, position.sequences * T
        self._tokens_of_rows = self._tokens
        self._flops_per_token, self._dtype, self._devices = flops_per_token, cfg.model.dtype, devices
        self.losses, self.skipped, self.recent = position.losses, position.skipped, position.recent
        self._energy = energy
        self._pending: tuple[int, int, Callable[[], dict[str, np.ndarray]]] | None = None
        self._durations: list[float] = []  # seconds per step since the last row
        self._mark: float | None = None

    def take(self, first: int, count: int, fetch: Callable[[], dict[str, np.ndarray]]) -> None:
        """Holds the metrics of steps first + 1 to first + count, still being computed, and writes those held before.

        Args:
          fetch: waits for them, and gives them as [] or [count].
        """
        pending, self._pending = self._pending, (first, count, fetch)
        if pending:
            self._write(*pending)
        else:
            self._mark = time.perf_counter()  # the call before this returned only when compiled
            self._energy.stepping(True)
        self._energy.tick()

    def flush(self) -> None:
        """Writes what is held; the clock stands still until the next `take`.

        Raises:
          DivergedError: too many steps in a row were skipped.
          Spike: a loss is one, and the config asks for a way back.
        """
        if self._pending:
            self._write(*self._pending)
        self._pending = self._mark = None
        self._energy.stepping(False)

    def mean_loss(self) -> float | None:
        """The mean training loss of the steps near to now, since it was last asked for; None where there was none."""
        total, count = self.losses
        self.losses = (0.0, 0)
        return total / count if count else None

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """A row of metrics that were computed elsewhere."""
        self._writers.write(step, metrics)
        self._progress.update(step, metrics)

    def _write(self, first: int, count: int, fetch: Callable[[], dict[str, np.ndarray]]) -> None:
        host = {name: np.atleast_1d(values) for name, values in fetch().items()}
        losses, skipped = host["train/loss"].tolist(), host["optim/skipped"].tolist()
        now = time.perf_counter()
        if self._mark is not None:
            self._durations.append((now - self._mark) / count)
        self._mark = now
        max_bad_steps, rollback_z = self._divergence.max_bad_steps, self._divergence.rollback_z
        end, of_call = self._tokens + count * self._tokens_per_step, None
        for i, (loss, bad) in enumerate(zip(losses, skipped, strict=True)):
            step = first + i + 1
            self._tokens += self._tokens_per_step
            if bad:
                self.skipped = (self.skipped[0] + 1, self.skipped[1] + 1)
                numbers = [host[name][i] for name in ("train/objective", "optim/grad_norm", "optim/update_norm")]
                finite = np.isfinite(numbers).all()
                what = (
                    "has an update, or a part of one, that skip_nonfinite holds back" if finite else "changes nothing"
                )
                self._say(
                    f"warning: step {step}, of batch {step - 1}, {what}: its loss is {numbers[0]:.4g}, the norm of its "
                    f"gradient {numbers[1]:.4g}, of its update {numbers[2]:.4g}"
                )
            else:
                self.skipped = (self.skipped[0], 0)
                if self._near(step):
                    self.losses = (self.losses[0] + loss, self.losses[1] + 1)
            if bad or (self._every and (step % self._every == 0 or step == self._last)):
                values = {name: float(x[i]) for name, x in host.items()}
                values |= {"optim/skipped": float(self.skipped[0]), "data/tokens": float(self._tokens)}
                if of_call is None:  # of all steps since the last call with a row, whose rows have the same
                    of_call = self._throughput() | self._energy.metrics(end - self._tokens_of_rows)
                    self._tokens_of_rows = end
                self.write(step, values | of_call)
            if not bad and rollback_z:
                self._look_for_spikes(step, loss)
            if self.skipped[1] >= max_bad_steps:
                raise DivergedError(
                    f"steps {step - self.skipped[1] + 1} to {step} had no finite loss, gradient or update "
                    "(divergence.max_bad_steps); lower the peak learning rate, clip gradients or lengthen the warmup. "
                    "Checkpoints from before are kept"
                )
        self._progress.update(first + count)

    def _look_for_spikes(self, step: int, loss: float) -> None:
        """The rule of `optim.wrappers.skip_spikes`; it looks at no loss while fewer than a window of them are known."""
        window, z = self._divergence.window, self._divergence.rollback_z
        if len(self.recent) == window and loss > statistics.fmean(self.recent) + z * statistics.pstdev(self.recent):
            raise Spike(step, loss)
        self.recent = (*self.recent, loss)[-window:]

    def _throughput(self) -> dict[str, float]:
        if not self._durations:
            return {}
        seconds = statistics.median(self._durations)
        self._durations.clear()
        rate = self._tokens_per_step / seconds
        kind = jax.devices()[0].device_kind
        used = mfu(rate, self._flops_per_token, kind, self._dtype, self._devices())
        found = {"throughput/step_ms": seconds * 1e3, "throughput/tokens_per_second": rate}
        return found | ({"throughput/mfu": used} if used is not None and math.isfinite(used) else {})
