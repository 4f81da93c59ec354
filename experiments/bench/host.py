"""Suite `host`: what the training loop costs beside the steps. It trains the tiny GPT by a step that computes nothing,
of the same state, batches, hyperparameters and metrics, through the same loop, logs and files."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from experiments.bench import cases, machine
from experiments.bench.remote import Remote
from experiments.bench.report import Limit, Row
from experiments.bench.timing import spread

STEPS = {1: 4_000, 32: 128_000}
LIMITS = {1: 0.3, 32: 0.02}  # ms a step; both by steps a call


def run(quick: bool) -> list[Row]:
    rounds, rows = 1 if quick else 7, []
    for count, steps in STEPS.items():
        machine.say(f"host: {count} steps a call, {rounds} rounds")
        with Remote("experiments.bench.host:Loop", count, steps // 20 if quick else steps) as loop:
            times = spread([loop.call("milliseconds") for _ in range(rounds)])
        name = f"tiny: the loop's own time a step, {count} {'step' if count == 1 else 'steps'} a call"
        rows.append(Row("host", name, "ms", times, limit=Limit("value", "<=", LIMITS[count])))
    return rows


class Loop:
    """The loop with a step that computes nothing."""

    def __init__(self, steps_per_call: int, steps: int) -> None:
        from jaxlm import config
        from jaxlm.training import step
        from jaxlm.training.prepare import prepare
        from jaxlm.training.steps import Alone

        fields: dict[str, Any] = {"steps": steps, "steps_per_call": steps_per_call, "data.tokenizer": "bytes"}
        fields |= {"eval.every": 0, "checkpoint.every": 0, "log.writers": ("jsonl",), "log.energy": "off"}
        settings = cases.settings(cases.TINY._replace(vocab_size=257))
        self._prepared = prepare(config.override(settings, fields))
        with mock.patch.object(step, "build", _idle(step.build)):
            self._steps = Alone(self._prepared.config)
        self._per_call = steps_per_call

    def milliseconds(self) -> float:
        """Of a step, from the beginning of the third call to that of the last."""
        from jaxlm.telemetry.progress import Silent
        from jaxlm.training import loop
        from jaxlm.training.run import open_run
        from jaxlm.training.signals import Signals

        begins: list[float] = []
        advance = self._steps.advance

        def timed(*arguments: Any) -> Any:
            begins.append(time.perf_counter())
            return advance(*arguments)

        with (
            tempfile.TemporaryDirectory() as folder,
            Signals() as signals,
            open_run(self._prepared, Path(folder), self._steps, lambda _: contextlib.nullcontext(Silent())) as one,
            mock.patch.object(self._steps, "advance", timed),
        ):
            loop.go([one], self._steps, signals)
        return (begins[-1] - begins[2]) / (len(begins) - 3) / self._per_call * 1e3


def _idle(build: Callable[..., Any]) -> Callable[..., Any]:
    """`step.build` of a step that looks at its arguments, counts, and changes nothing else."""
    import jax
    import jax.numpy as jnp

    def idle(*arguments: Any, **named: Any) -> Any:
        program = build(*arguments, **named)

        def train_step(hparams: Any, state: Any, batch: Any) -> tuple[Any, Any]:
            metrics = jax.eval_shape(program.train_step, hparams, state, batch)[1]
            looked_at = sum(jnp.ravel(x)[0].astype(jnp.float32) for x in jax.tree.leaves((hparams, batch)))
            zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in metrics.items()}
            return state._replace(step=state.step + 1), zeros | {"train/loss": looked_at}

        return program._replace(train_step=train_step)

    return idle
