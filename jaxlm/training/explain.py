"""What a config means before anything runs: fields, parameters, what the optimizer does to each, FLOPs, memory."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm import config, tree
from jaxlm.optim import chain
from jaxlm.telemetry.flops import flops_per_token
from jaxlm.training import step
from jaxlm.training.loop import prepare


def explain(cfg: ConfigDict | FrozenConfigDict) -> str:
    """The resolved config, a table of parameters with the stages that touch each, FLOPs and memory, as text.

    No parameter is allocated: shapes are enough. The data is opened, since the vocabulary may come from it.

    Raises:
      ConfigError, DataError: as `jaxlm.train`.
    """
    cfg, opened = prepare(cfg)
    structure, hparams = step.split(cfg)
    state = jax.eval_shape(step.build(structure).init, jax.random.key(0), hparams)
    return "\n\n".join(
        [
            "config\n" + "\n".join(f"  {path} = {value!r}" for path, value in config.items(cfg)),
            "parameters\n" + parameters(cfg, state.params),
            "optimizer\n" + optimizer(cfg),
            "costs\n" + costs(cfg, state, opened.train.num_tokens),
        ]
    )


def parameters(cfg: FrozenConfigDict, params: step.PyTree) -> str:
    """One line a parameter: path, shape, size, and the numbers of the stages that touch it."""
    stages = chain.explain(cfg.optimizer.to_dict(), params)
    number = {name: str(i) for i, name in enumerate(cfg.optimizer.chain, 1)}
    rows = [("path", "shape", "size", "stages")]
    for path, leaf in zip(tree.paths(params), jax.tree.leaves(params), strict=True):
        rows.append((path, str(list(leaf.shape)), f"{leaf.size:,}", " ".join(number[name] for name in stages[path])))
    rows.append(("total", "", f"{tree.size(params):,}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        f"  {path:<{widths[0]}}  {shape:<{widths[1]}}  {size:>{widths[2]}}  {touched}".rstrip()
        for path, shape, size, touched in rows
    )


def optimizer(cfg: FrozenConfigDict) -> str:
    """The chain in order, with arguments, and the learning rate over the run."""
    spec = cfg.optimizer.to_dict()
    lines = []
    for i, stage in enumerate(chain.stages(spec), 1):
        arguments = dict(stage.arguments) | ({"where": stage.where} if stage.where else {})
        listed = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        lines.append(f"  {i}. {stage.name}({listed})")
    marks = sorted({0, cfg.steps // 100, cfg.steps // 10, cfg.steps // 2, cfg.steps - 1})
    rates = [chain.learning_rate(spec, None, cfg.steps, jnp.int32(mark)) for mark in marks]
    if rates[0] is not None:
        listed = ", ".join(f"{rate:.3g} at step {mark}" for mark, rate in zip(marks, rates, strict=True))
        lines.append(f"  learning rate: {listed}")
    return "\n".join(lines)


def costs(cfg: FrozenConfigDict, state: step.State, num_tokens: int) -> str:
    """FLOPs of the run and bytes of the state; activations depend on the compiler and are not in it."""
    model, T = cfg.model, cfg.model.context_length
    matmuls = tree.size(state.params) - tree.size(state.params["wpe"])
    per_token = flops_per_token(matmuls, model.num_layers, T, model.embed_dim)
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
