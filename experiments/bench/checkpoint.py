"""Suite `checkpoint`: how long a save holds training up, how long until it is whole, and how long a resume takes."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.bench import machine
from experiments.bench.cases import BABY, GPT2, Case, settings
from experiments.bench.remote import Remote
from experiments.bench.report import Limit, Row
from experiments.bench.timing import spread

LIMIT = Limit("value", "<=", 0.3)


def run(quick: bool) -> list[Row]:
    case = BABY._replace(vocab_size=257) if quick else GPT2._replace(vocab_size=50257, dtype="float32")
    return measure(case, rounds=1 if quick else 5)


def measure(case: Case, rounds: int) -> list[Row]:
    machine.say(f"checkpoint: {case.name}, {rounds} rounds")
    with tempfile.TemporaryDirectory() as temporary, Remote("experiments.bench.checkpoint:Jaxlm") as jaxlm:
        times = [jaxlm.call("save", case, temporary, n) for n in range(1, rounds + 1)]
    held, whole, restored = (spread(list(found)) for found in zip(*times, strict=True))
    name = f"{case.name}, fp32, with Adam's moments"
    return [
        Row("checkpoint", f"{name}: a save holds training up", "s", held, limit=LIMIT),
        Row("checkpoint", f"{name}: until it is whole, hashes included", "s", whole),
        Row("checkpoint", f"{name}: checking all hashes and restoring", "s", restored),
    ]


def state_of(case: Case) -> tuple[Any, Any]:
    """(config, state): initial parameters, and moments that don't compress."""
    import jax

    from jaxlm import config
    from jaxlm.training import step

    cfg = config.resolve(settings(case))
    structure, hparams = step.split(cfg)
    state = jax.jit(step.build(structure).init)(jax.random.key(0), hparams)
    moments = jax.tree.map(
        lambda x: 1e-3 * jax.random.normal(jax.random.key(x.size), x.shape) if x.ndim else x, state.opt_state
    )
    return cfg, state._replace(opt_state=moments)


class Jaxlm:
    """`Checkpoints.save`, `wait`, `whole` and `restore`."""

    def __init__(self) -> None:
        self._made: tuple[Any, Any] | None = None

    def save(self, case: Case, folder: str, step: int) -> tuple[float, float, float]:
        """Seconds that `save` blocks, seconds from its call until the checkpoint is whole, and to get it back."""
        import jax
        import jax.numpy as jnp

        from jaxlm.training.checkpoint import Checkpoints

        cfg, state = self._made = self._made or state_of(case)
        state = jax.block_until_ready(state._replace(step=jnp.int32(step)))
        with Checkpoints(Path(folder) / "checkpoints") as checkpoints:
            begin = time.perf_counter()
            checkpoints.save(state, {}, cfg, {})
            held = time.perf_counter() - begin
            checkpoints.wait()
            whole = time.perf_counter() - begin
            begin = time.perf_counter()
            latest = checkpoints.whole()
            assert latest == step
            jax.block_until_ready(checkpoints.restore(state, latest).state.params)
            return held, whole, time.perf_counter() - begin
