"""From a config to what is known before anything is computed: its derived fields, its data, its initial source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm import config, config_json, data
from jaxlm.errors import ConfigError
from jaxlm.evals import asking
from jaxlm.optim import chain
from jaxlm.training import initial, processes


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
