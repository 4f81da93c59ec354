"""jaxlm's side: its steps, driven as `training.loop` does."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.bench import cases
from experiments.bench.cases import Case
from jaxlm import config
from jaxlm.model import huggingface
from jaxlm.telemetry import flops
from jaxlm.training import memory, step
from jaxlm.training.host import keep_memory
from jaxlm.training.steps import Alone


class First(NamedTuple):
    """The first call of a fresh process."""

    losses: list[float]
    seconds: float  # from the call to the loss, tracing and compilation included
    compile: float  # seconds of it: tracing and lowering, and XLA; not told of several steps a call


class Ours:
    """A model in training. `run` makes batches before the clock starts, copies them to the device under it, and
    fetches the metrics of a call while the next one runs.

    Args:
      fields: of its config, by path, where they are other than the case's.
      keep: freed memory, as the doors do.
    """

    def __init__(self, case: Case, fields: Mapping[str, Any] | None = None, keep: bool = True) -> None:
        if keep:
            keep_memory()  # as the doors do
        cfg = config.resolve(config.override(cases.settings(case), fields or {}))
        hparams = step.split(cfg)[1]
        self.case, self._count, self._steps = case, cfg.steps_per_call, Alone(cfg)
        self._hparams = self._steps.stacked([hparams])
        self._state = self._steps.init(cfg.seed, hparams, None)
        self._batches = cases.batches(case)
        jax.block_until_ready(self._state)

    def weights(self) -> dict[str, np.ndarray]:
        """Parameters as they are now, as transformers names and shapes them."""
        return huggingface.tensors(jax.tree.map(np.asarray, self._state.params), self.case.vocab_size)

    def matmul_parameters(self) -> int:
        """N of `telemetry.flops.flops_per_token`."""
        return flops.matmul_size(self._state.params, self.case.vocab_size)

    def bytes(self) -> int:
        """That a step takes of a device, by the compiler's account."""
        return memory.of(self._steps.lower().compile())

    def device_kind(self) -> str:
        return str(jax.devices()[0].device_kind)

    def peak_gb(self) -> float | None:
        """The most that this process had of a device's memory, where the device tells."""
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return None if peak is None else float(peak) / 1e9

    def first(self) -> First:
        """Steps 0 to steps_per_call - 1."""
        begin = time.perf_counter()
        if self._count == 1:
            self._steps.lower().compile()  # the step below finds it
        compiled = time.perf_counter() - begin
        losses, seconds = self.run(0, self._count)
        return First(losses, compiled + seconds, compiled)

    def run(self, start: int, steps: int) -> tuple[list[float], float]:
        """(losses, seconds) of steps start, ..., start + steps - 1: a multiple of `steps_per_call`."""
        calls = [self._rows(n) for n in range(start, start + steps, self._count)]
        losses: list[float] = []
        pending: Any = None
        begin = time.perf_counter()
        for rows in calls:
            batch = self._steps.batch([rows])
            self._state, metrics = self._steps.advance(self._hparams, self._state, batch, self._count)
            if pending is not None:
                losses += self._losses(pending)
            pending = metrics
        losses += self._losses(pending)
        return losses, time.perf_counter() - begin

    def _losses(self, metrics: Any) -> list[float]:
        found: list[float] = np.atleast_1d(self._steps.fetch(metrics)["train/loss"]).tolist()
        return found

    def _rows(self, n: int) -> dict[str, np.ndarray]:
        """The batch of the call that begins with step n: [B, T], or [steps_per_call, B, T]."""
        size, count = self.case.batch_size, self._count
        rows = self._batches.rows(n * size, count * size)
        return rows if count == 1 else {name: x.reshape(count, size, -1) for name, x in rows.items()}
