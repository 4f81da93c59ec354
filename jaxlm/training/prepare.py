"""From a config to what is known before anything is computed: its derived fields, its data, its initial source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm import config, config_json, data
from jaxlm.errors import ConfigError
from jaxlm.evals import asking, perplexity
from jaxlm.model import gpt2
from jaxlm.model.losses import TokenSums
from jaxlm.optim import chain, review
from jaxlm.optim.stages import stages
from jaxlm.optim.wrappers import evaluation_params
from jaxlm.training import initial, position, processes, step


class Prepared(NamedTuple):
    config: FrozenConfigDict
    data: data.Data
    source: initial.Source | None  # what `init_from` names, where it is needed


def prepare(cfg: ConfigDict | FrozenConfigDict, workdir: Path | None = None) -> Prepared:
    """The config with all that is derived from `init_from` and the data, and these.

    Args:
      workdir: the directory of a run, which may have begun there.

    Raises:
      ConfigError, DataError: as `train`.
    """
    cfg = config.resolve(cfg)
    if processes.count() > 1:
        processes.agree("versions", processes.versions())
        processes.agree("a config", config.flat(json.loads(config_json.to_json(cfg))))
    chain.build(cfg.optimizer.to_dict(), None, cfg.steps)  # may refuse it, before a corpus is tokenized for nothing
    asking.check_config(cfg)  # so may this
    source, section = None, cfg.data
    if cfg.init_from and workdir is not None and (known := initial.taken_over(cfg, workdir)):
        cfg, section = known, config.override(known, {"data.tokenizer": str(workdir)}).data
    elif cfg.init_from:
        cfg, source = initial.follow(cfg)
        section = cfg.data
    with processes.in_turn():
        opened = data.open(section, progress=cfg.log.progress and processes.first())
    processes.agree("data", {"data.source": opened.train.sha256, "data.tokenizer": opened.tokenizer.fingerprint})
    needed, given = opened.tokenizer.vocab_size, cfg.model.vocab_size
    if given and given < needed:
        whose = f" of {cfg.init_from!r}" if source and given == source.config.model.vocab_size else ""
        raise ConfigError(
            f"model.vocab_size={given}{whose}, but the tokenizer {cfg.data.tokenizer!r} has {needed} ids; "
            f"set model.vocab_size={needed}"
        )
    resolved = config.resolve(config.override(cfg, {"model.vocab_size": given or needed}))
    if opened.validation is not None:
        asking.check(cfg.eval.tasks, asking.subject(resolved, opened.tokenizer, opened.validation))
    return Prepared(resolved, opened, source)


def doubts(cfg: FrozenConfigDict) -> list[str]:
    """What is almost surely wrong in the optimizer, as lines to say.

    Raises:
      ConfigError: there is something and the config is strict, or nothing sets a learning rate; or no evaluation gives
        the metric that the run is judged by.
    """
    if cfg.eval.every and cfg.data.validation and not cfg.eval.tasks:  # of these nobody knows what they will tell
        _check_judges(cfg)
    params = gpt2.shapes(cfg.model)
    found = review.check(cfg.optimizer.to_dict(), params, strict=cfg.strict)
    if rateless := [finding for finding in found if finding.rule == review.NO_LEARNING_RATE]:
        raise ConfigError(f"optimizer.chain has no learning rate: {rateless[0].reason}")
    said = [f"warning: optimizer.{stage}: {reason}" for _, stage, reason in found]
    frozen = any(way.frozen for way in review.ways(stages(cfg.optimizer.to_dict()), params))
    if cfg.model.lora.rank and not frozen:
        said.append(
            "warning: model.lora is on and nothing is frozen; begin the chain with 'freeze', where='^(?!lora/)'"
        )
    return said


def _check_judges(cfg: FrozenConfigDict) -> None:
    """`checkpoint.best` and `early_stopping.metric` are metrics of an evaluation without tasks."""
    ones = TokenSums(*np.ones(len(TokenSums._fields)))
    usual = perplexity.of_all({"": ones}, 1.0) | {"eval/gap": 0.0}
    judges = {cfg.checkpoint.best, cfg.early_stopping.metric if cfg.early_stopping.patience else ""} - {""}
    if {name.removeprefix("-") for name in judges} <= {*usual}:
        return
    state = step.shapes(cfg)
    averages = jax.eval_shape(evaluation_params, state.opt_state, state.params)
    position.check(cfg, usual | perplexity.of_all(dict.fromkeys(averages, ones), 1.0))
