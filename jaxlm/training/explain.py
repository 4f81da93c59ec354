"""What a config means before anything runs: fields, parameters, what the optimizer does to each, FLOPs, memory."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm import config, optim, tree
from jaxlm.optim import chain
from jaxlm.optim.stages import stages, walk
from jaxlm.telemetry.flops import flops_per_token
from jaxlm.training import step
from jaxlm.training.loop import prepare


def explain(cfg: ConfigDict | FrozenConfigDict) -> str:
    """The resolved config, a table of parameters with the stages that touch each, FLOPs and memory, as text.

    No parameter is allocated or read: shapes are enough. The data is opened, since the vocabulary may come from it.

    Raises:
      ConfigError, DataError: as `jaxlm.train`.
    """
    cfg, opened, source = prepare(cfg)
    structure, hparams = step.split(cfg)
    state = jax.eval_shape(step.build(structure).init, jax.random.key(0), hparams)
    return "\n\n".join(
        [
            "config\n" + "\n".join(f"  {path} = {value!r}" for path, value in config.items(cfg)),
            *(["initial parameters\n" + "\n".join(f"  {line}" for line in source.said)] if source else []),
            "parameters\n" + parameters(cfg, state.params),
            "optimizer\n" + optimizer(cfg, state.params),
            "costs\n" + costs(cfg, state, opened.train.num_tokens),
        ]
    )


def parameters(cfg: FrozenConfigDict, params: step.PyTree) -> str:
    """One line a parameter: path, shape, size, the numbers of the stages that touch it, its weight decay, its learning
    rate over the chain's, and its bytes of optimizer state."""
    spec = cfg.optimizer.to_dict()
    touched = optim.explain(spec, params, cfg.steps)
    number = {stage.name: str(i) for i, stage in enumerate(walk(stages(spec)), 1)}
    rows = [("path", "shape", "size", "stages", "decay", "rate", "state")]
    for path, leaf in zip(tree.paths(params), jax.tree.leaves(params), strict=True):
        by, decay, multiplier, state = touched[path]
        numbers = " ".join(number[name] for name in by)
        shape = str(list(leaf.shape))
        rows.append((path, shape, f"{leaf.size:,}", numbers, f"{decay:g}", f"x{multiplier:g}", f"{state:,} B"))
    rows.append(("total", "", f"{tree.size(params):,}", "", "", "", ""))
    widths = [max(map(len, column)) for column in zip(*rows)]
    left = (str.ljust, str.ljust, str.rjust, str.ljust, str.rjust, str.rjust, str.rjust)
    return "\n".join(
        ("  " + "  ".join(pad(cell, width) for pad, cell, width in zip(left, row, widths))).rstrip() for row in rows
    )


def optimizer(cfg: FrozenConfigDict, params: step.PyTree) -> str:
    """The chain in order, with arguments; the learning rate over the run; and what is doubtful."""
    spec = cfg.optimizer.to_dict()
    out = [f"  {i}. {line}" for i, line in enumerate(chain.lines(spec), 1)]
    marks = sorted({0, cfg.steps // 100, cfg.steps // 10, cfg.steps // 2, cfg.steps - 1})
    rates = [chain.learning_rates(spec, None, cfg.steps, jnp.int32(mark)) for mark in marks]
    for name in rates[0]:
        listed = ", ".join(f"{rate[name]:.3g} at step {mark}" for mark, rate in zip(marks, rates, strict=True))
        out.append(f"  learning rate ({name}): {listed}")
    out += [f"  doubt: {stage}: {reason}" for _, stage, reason in optim.check(spec, params)]
    return "\n".join(out)


def costs(cfg: FrozenConfigDict, state: step.State, num_tokens: int) -> str:
    """FLOPs of the run and bytes of the state; activations depend on the compiler and are not in it."""
    model, T = cfg.model, cfg.model.context_length
    per_token = flops_per_token(tree.matmul_size(state.params), model.num_layers, T, model.embed_dim)
    tokens = cfg.steps * cfg.data.batch_size * T

    def size(part: step.PyTree) -> str:
        return f"{sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(part)) / 1e6:,.1f} MB"

    return "\n".join(
        [
            f"  training tokens   {tokens:,} in {cfg.steps:,} steps, {tokens / num_tokens:.2f} times {num_tokens:,}",
            f"  FLOPs             {per_token:,} a token, {per_token * tokens:.3g} in all",
            f"  memory            parameters {size(state.params)}, optimizer {size(state.opt_state)}, "
            f"gradients {size(state.params)}",
        ]
    )
