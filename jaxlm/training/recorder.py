"""Metrics on their way out: those of one call are fetched while the next one runs, so the device never waits."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import jax
import numpy as np

from jaxlm.errors import DivergedError
from jaxlm.telemetry.flops import mfu
from jaxlm.telemetry.progress import Progress
from jaxlm.telemetry.writers import Writers


class Recorder:
    """Takes the metrics of each call of the step, writes every `every`-th step's as a row.

    Args:
      tokens_per_step: in a batch, over all devices.
      losses: sum and number of the training losses since the last evaluation.
      flops_per_token: of forward and backward pass, for the MFU.
      dtype: of the computation.
    """

    def __init__(
        self,
        writers: Writers,
        progress: Progress,
        *,
        every: int,
        tokens_per_step: int,
        tokens_before: int,
        losses: tuple[float, int],
        flops_per_token: int,
        dtype: str,
    ):
        self._writers, self._progress, self._every = writers, progress, every
        self._tokens_per_step, self._tokens, self._flops_per_token, self._dtype = (
            tokens_per_step,
            tokens_before,
            flops_per_token,
            dtype,
        )
        self.losses = losses
        self._pending: tuple[int, int, Any] | None = None
        self._durations: list[float] = []  # seconds per step since the last row
        self._mark: float | None = None

    def take(self, first: int, count: int, metrics: Any) -> None:
        """Holds the metrics of steps first + 1 to first + count, still being computed, and writes those held before."""
        pending, self._pending = self._pending, (first, count, metrics)
        if pending:
            self._write(*pending)
        else:
            self._mark = time.perf_counter()  # the call before this returned only when compiled

    def flush(self) -> None:
        """Writes what is held; the clock stands still until the next `take`.

        Raises:
          DivergedError: a loss is not finite.
        """
        if self._pending:
            self._write(*self._pending)
        self._pending = self._mark = None

    def mean_loss(self) -> float | None:
        """The mean training loss since it was last asked for; None where there was none."""
        total, count = self.losses
        self.losses = (0.0, 0)
        return total / count if count else None

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """A row of metrics that were computed elsewhere."""
        self._writers.write(step, metrics)
        self._progress.update(step, metrics)

    def _write(self, first: int, count: int, metrics: Any) -> None:
        host = {name: np.atleast_1d(values) for name, values in jax.device_get(metrics).items()}
        now = time.perf_counter()
        if self._mark is not None:
            self._durations.append((now - self._mark) / count)
        self._mark = now
        bad = np.flatnonzero(~np.isfinite(host["train/objective"]))
        for i in range(int(bad[0]) + 1 if bad.size else count):
            step = first + i + 1
            self._tokens += self._tokens_per_step
            self.losses = (self.losses[0] + float(host["train/loss"][i]), self.losses[1] + 1)
            if bad.size and i == bad[0]:
                self.write(step, {name: float(values[i]) for name, values in host.items()})
                raise DivergedError(
                    f"the loss of step {step} is {host['train/objective'][i]}; lower the peak learning rate, "
                    "clip gradients or lengthen the warmup. Checkpoints from before are kept"
                )
            if self._every and step % self._every == 0:
                row = {name: float(values[i]) for name, values in host.items()}
                self.write(step, row | {"data/tokens": float(self._tokens)} | self._throughput())
            else:
                self._progress.update(step)

    def _throughput(self) -> dict[str, float]:
        if not self._durations:
            return {}
        seconds = statistics.median(self._durations)
        self._durations.clear()
        rate = self._tokens_per_step / seconds
        device = jax.devices()[0]
        used = mfu(rate, self._flops_per_token, device.device_kind, self._dtype, jax.device_count())
        found = {"throughput/step_ms": seconds * 1e3, "throughput/tokens_per_second": rate}
        return found | ({"throughput/mfu": used} if used is not None and math.isfinite(used) else {})
