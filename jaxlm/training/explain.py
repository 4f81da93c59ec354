"""What a config means before anything runs: fields, parameters, what the optimizer does to each, FLOPs, memory."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm import config, optim, redact, tree
from jaxlm.optim import chain, edits
from jaxlm.optim.stages import stages, walk
from jaxlm.telemetry import curves, flops
from jaxlm.telemetry.text import aligned
from jaxlm.training import devices, memory, parallel, step
from jaxlm.training.prepare import prepare

_DRAWN = 2**20  # steps of a schedule, at most


def explain(cfg: ConfigDict | FrozenConfigDict, workdir: Path | None = None) -> str:
    """The resolved config, a table of parameters with the stages that touch each, FLOPs and memory, as text without
    secrets.

    No parameter is allocated or read: shapes are enough. The data is opened, since the vocabulary may come from it.

    Args:
      workdir: the directory of a run, which may have begun there; schedule.png, the learning rate over it, goes there.
        None: nowhere.

    Raises:
      ConfigError, DataError: as `jaxlm.train`.
    """
    cfg, opened, source = prepare(cfg, workdir)
    state = step.shapes(cfg)
    shown = config.items(redact.fields(cfg))
    text = "\n\n".join(
        [
            "config\n" + "\n".join(f"  {path} = {value!r}" for path, value in shown),
            *(["initial parameters\n" + "\n".join(f"  {line}" for line in source.said)] if source else []),
            "parameters\n" + parameters(cfg, state.params),
            "optimizer\n" + optimizer(cfg, state.params),
            "learning rate\n" + schedule(cfg, workdir),
            "costs\n" + costs(cfg, state, opened.train.num_tokens),
        ]
    )
    return redact.text(text)


def parameters(cfg: FrozenConfigDict, params: step.PyTree) -> str:
    """One line a parameter: path, shape, size, the numbers of the stages that touch it, its weight decay, its learning
    rate over the chain's (from the first layer to the last), and its bytes of optimizer state."""
    spec = cfg.optimizer.to_dict()
    touched = optim.explain(spec, params, cfg.steps)
    number = {stage.name: str(i) for i, stage in enumerate(walk(stages(spec)), 1)}
    lies = jax.tree.leaves(parallel.shardings(params, devices.imagined(cfg)))
    rows: list[tuple[str, ...]] = [("path", "shape", "size", "stages", "decay", "rate", "state", "divided")]
    for path, leaf, sharding in zip(tree.paths(params), jax.tree.leaves(params), lies, strict=True):
        by, decay, last, first, state = touched[path]
        numbers = " ".join(number[name] for name in by)
        shape = str(list(leaf.shape))
        over = ", ".join(axes if isinstance(axes, str) else "+".join(axes or "-") for axes in sharding.spec)
        rate = f"x{last:g}" if first == last else f"x{first:g} to x{last:g}"
        rows.append((path, shape, f"{leaf.size:,}", numbers, f"{decay:g}", rate, f"{state:,} B", over))
    rows.append(("total", "", f"{tree.size(params):,}", "", "", "", "", ""))
    if padding := flops.padding(params, cfg.model.vocab_size):
        rows.append(("its padding", "", f"{padding:,}", "", "", "", "", ""))
    if not any(row[-1] for row in rows[1:]):  # all lie whole on each device
        rows = [row[:-1] for row in rows]
    return "\n".join(f"  {line}" for line in aligned(rows, right={2, 4, 5, 6}))


def optimizer(cfg: FrozenConfigDict, params: step.PyTree) -> str:
    """The chain in order, with arguments, and what is doubtful in it."""
    spec = cfg.optimizer.to_dict()
    out = [f"  {line}" for line in edits.lines(spec, numbered=True)]
    out += [f"  doubt: {stage}: {reason}" for _, stage, reason in optim.check(spec, params, steps=cfg.steps)]
    return "\n".join(out)


def schedule(cfg: FrozenConfigDict, workdir: Path | None) -> str:
    """The learning rate of each stage that has one, over the run: drawn in a line of text, and in schedule.png."""
    steps = np.linspace(0, cfg.steps - 1, min(cfg.steps, _DRAWN)).astype(np.int32)
    rates = jax.vmap(lambda n: chain.learning_rates(cfg.optimizer.to_dict(), None, cfg.steps, n))(steps)
    out = []
    for name, values in rates.items():
        first, highest, last = values[0], values.max(), values[-1]
        out.append(f"  {name}: {first:.3g}, at most {highest:.3g}, {last:.3g} at the end")
        out.append(f"  {curves.sparkline(values)}")
    if workdir is not None and rates:
        workdir.mkdir(parents=True, exist_ok=True)
        if picture := curves.draw_schedule(rates, workdir / "schedule.png", steps):
            out.append(f"  {picture}")
    return "\n".join(out or ["  none"])


def costs(cfg: FrozenConfigDict, state: step.State, num_tokens: int) -> str:
    """FLOPs of the run and memory of a step."""
    model, T = cfg.model, cfg.model.context_length
    per_token = flops.of_model(model, state.params)
    tokens, mesh = cfg.steps * cfg.data.batch_size * T, devices.imagined(cfg)
    part = parallel.bytes_per_device((state.params, state.opt_state), mesh)
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    need, elsewhere = (memory.estimate(cfg, mesh, here) for here in (True, False))
    on_gpu = []
    if jax.default_backend() == "cpu" and elsewhere != need:
        kept = memory.shown({"activations": elsewhere["activations"]})
        on_gpu.append(
            f"  on a GPU          {kept}, with cuDNN's attention; the above is of attention in blocks, as here"
        )
    return "\n".join(
        [
            f"  training tokens   {tokens:,} in {cfg.steps:,} steps, {tokens / num_tokens:.2f} times {num_tokens:,}",
            f"  FLOPs             {per_token:,} a token, {per_token * tokens:.3g} in all",
            f"  memory            about: {memory.shown(need)}",
            *on_gpu,
            f"  devices           {axes}: {part / 1e6:,.1f} MB of parameters and optimizer state on each",
        ]
    )
