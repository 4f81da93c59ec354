"""jaxlm's side: its Program, compiled and driven as `training.loop` does."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.bench import cases
from experiments.bench.cases import Case
from jaxlm import config, tree
from jaxlm.model import huggingface
from jaxlm.training import devices, parallel, step
from jaxlm.training.host import keep_memory


class First(NamedTuple):
    """The first call of a fresh process."""

    losses: list[float]
    seconds: float  # from the call to the loss, tracing and compilation included
    compile: float  # seconds of it: tracing and lowering, and XLA


class Ours:
    """A model in training. `run` makes batches before the clock starts, copies them to the device under it, and
    fetches the metrics of a call while the next one runs."""

    def __init__(self, case: Case, steps_per_call: int = 1, attention: str = "") -> None:
        keep_memory()  # as the doors do
        if attention:
            case = case._replace(attention=attention)
        cfg = config.resolve(cases.settings(case))
        self.case, self.steps_per_call = case, steps_per_call
        self._mesh = devices.mesh(cfg)
        structure, self._hparams = step.split(cfg)
        program = step.build(structure)
        self._state = parallel.compile(program.init, self._mesh)(jax.random.key(cfg.seed), self._hparams)
        train = program.train_step if steps_per_call == 1 else parallel.repeat(program.train_step)
        self._advance: Any = parallel.compile(train, self._mesh, donate=(1,))
        self._batches = cases.batches(case)
        jax.block_until_ready(self._state)

    def weights(self) -> dict[str, np.ndarray]:
        """Parameters as they are now, as transformers names and shapes them."""
        return huggingface.tensors(jax.tree.map(np.asarray, self._state.params), self.case.vocab_size)

    def matmul_parameters(self) -> int:
        """N of `telemetry.flops.flops_per_token`."""
        return tree.matmul_size(self._state.params)

    def first(self) -> First:
        """Steps 0 to steps_per_call - 1."""
        batch = parallel.put(self._rows(0), self._mesh)
        begin = time.perf_counter()
        self._advance.lower(self._hparams, self._state, batch).compile()
        compiled = time.perf_counter() - begin
        losses, seconds = self.run(0, self.steps_per_call)
        return First(losses, compiled + seconds, compiled)

    def run(self, start: int, steps: int) -> tuple[list[float], float]:
        """(losses, seconds) of steps start, ..., start + steps - 1: a multiple of `steps_per_call`."""
        calls = [self._rows(n) for n in range(start, start + steps, self.steps_per_call)]
        losses: list[float] = []
        pending: Any = None
        begin = time.perf_counter()
        for batch in calls:
            self._state, metrics = self._advance(self._hparams, self._state, parallel.put(batch, self._mesh))
            if pending is not None:
                losses += _losses(pending)
            pending = metrics
        losses += _losses(pending)
        return losses, time.perf_counter() - begin

    def _rows(self, n: int) -> dict[str, np.ndarray]:
        """The batch of the call that begins with step n: [B, T], or [steps_per_call, B, T]."""
        size, count = self.case.batch_size, self.steps_per_call
        rows = self._batches.rows(n * size, count * size)
        return rows if count == 1 else {name: x.reshape(count, size, -1) for name, x in rows.items()}


def _losses(metrics: Any) -> list[float]:
    host = jax.device_get(metrics)  # all of them, as the loop does
    return np.atleast_1d(host["train/loss"]).tolist()
