"""What is almost surely wrong in a run that could be trained, before a step is taken."""

from __future__ import annotations

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from jaxlm.errors import ConfigError, nearest
from jaxlm.evals import perplexity
from jaxlm.model import gpt2, lora
from jaxlm.model.losses import TokenSums
from jaxlm.optim import review
from jaxlm.optim.stages import stages
from jaxlm.optim.ways import ways
from jaxlm.optim.wrappers import evaluation_params
from jaxlm.training import position, step

_ONES = TokenSums(*np.ones(len(TokenSums._fields)))
_USUAL = perplexity.of_all({"": _ONES}, 1.0) | {"eval/gap": 0.0}  # whatever the optimizer
_OF_STEPS = ("optim/", "throughput/", "energy/", "data/")


def check(cfg: FrozenConfigDict) -> list[str]:
    """What is almost surely wrong, as lines to say.

    Raises:
      ConfigError: there is something and the config is strict, or nothing sets a learning rate; or no evaluation gives
        the metric that the run is judged by.
    """
    if cfg.eval.every and cfg.data.validation and not cfg.eval.tasks:  # of these nobody knows what they will tell
        _check_judges(cfg)
    params = gpt2.shapes(cfg.model)
    found = review.check(cfg.optimizer.to_dict(), params, steps=cfg.steps, strict=cfg.strict)
    if rateless := [finding for finding in found if finding.rule == review.NO_LEARNING_RATE]:
        raise ConfigError(f"optimizer.chain has no learning rate: {rateless[0].reason}")
    said = [f"warning: optimizer.{stage}: {reason}" for _, stage, reason in found]
    return said + [f"warning: {doubt}" for doubt in _beside_lora(cfg, params)]


def _beside_lora(cfg: FrozenConfigDict, params: step.PyTree) -> list[str]:
    """What is trained beside the thin matrices of low-rank adaptation, as a line where that is anything.

    Raises:
      ConfigError: it is, and the config is strict.
    """
    passed = ways(stages(cfg.optimizer.to_dict()), params)
    loose = [way.path for way in passed if not way.frozen and not way.path.startswith(f"{lora.KEY}/")]
    if not cfg.model.lora.rank or not loose:
        return []
    others = f" and {len(loose) - 1} others are" if len(loose) > 1 else " is"
    said = f"model.lora is on, and {loose[0]}{others} trained too; begin the chain with 'freeze', where='^(?!lora/)'"
    if cfg.strict:
        raise ConfigError(said)
    return [said]


def check_metric(cfg: FrozenConfigDict, metric: str) -> None:
    """That rows of metrics.jsonl will have a metric, as far as that is known before a step: of tasks it is not.

    Raises:
      ConfigError: they won't.
    """
    if metric.startswith(_OF_STEPS) or (metric.startswith("eval/") and cfg.eval.tasks):
        return
    known = {"train/loss", "train/objective", "train/accuracy", *_evaluated(cfg)}
    if metric not in known:
        raise ConfigError(f"no run writes a metric {metric!r}: {nearest(metric, known)}")
    if metric.startswith("eval/") and not (cfg.eval.every and cfg.data.validation):
        raise ConfigError(f"metric {metric!r} takes evaluations; set eval.every and data.validation")


def _check_judges(cfg: FrozenConfigDict) -> None:
    """`checkpoint.best` and `early_stopping.metric` are metrics of an evaluation without tasks."""
    judges = {cfg.checkpoint.best, cfg.early_stopping.metric if cfg.early_stopping.patience else ""} - {""}
    if not {name.removeprefix("-") for name in judges} <= {*_USUAL}:
        position.check(cfg, _evaluated(cfg))


def _evaluated(cfg: FrozenConfigDict) -> dict[str, float]:
    """The metrics of an evaluation without tasks, with some values."""
    state = step.shapes(cfg)
    averages = jax.eval_shape(evaluation_params, state.opt_state, state.params)
    return _USUAL | perplexity.of_all(dict.fromkeys(averages, _ONES), 1.0)
