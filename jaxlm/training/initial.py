"""Where a run's first parameters come from: `init_from`, another model, whose architecture the config follows."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import FrozenConfigDict

from jaxlm import config
from jaxlm.data.tokenizers import Bytes, Tokenizer
from jaxlm.errors import ConfigError, DataError
from jaxlm.model import lora
from jaxlm.model.resize import resize
from jaxlm.training import rundir
from jaxlm.training.load import Located, locate, read_config, read_params, read_tokenizer
from jaxlm.training.step import PyTree
from jaxlm.training.step_folders import StepFolders

FOLLOWS = (
    "num_layers",
    "num_heads",
    "embed_dim",
    "feed_forward_dim",
    "activation",
    "norm_epsilon",
    "scale_attention",
    "scale_attention_by_layer",
    "tie_embeddings",
)
"""Fields of the `model` section that the parameters decide."""


class Source(NamedTuple):
    located: Located
    config: FrozenConfigDict  # whose `model` section the parameters are of
    tokenizer: Tokenizer | None  # None where it has none
    said: list[str]  # what the config took over, as lines to say


def follow(cfg: FrozenConfigDict) -> tuple[FrozenConfigDict, Source]:
    """The config with the architecture of its `init_from`, and with its context, vocabulary and tokenizer where it
    names none.

    No parameter is read.

    Raises:
      ConfigError: the config asks for another architecture.
      DataError: there is no such model.
    """
    spec = cfg.init_from
    located = locate(spec)
    source = read_config(spec, located)
    theirs = source.model.to_dict() | {"feed_forward_dim": source.model.feed_forward_dim or 4 * source.model.embed_dim}
    usual, changes = config.default().model, {}
    for name in FOLLOWS:
        given, found = cfg.model[name], theirs[name]
        if given not in (usual[name], found):
            raise ConfigError(
                f"model.{name} is {given!r}, but that of init_from={spec!r} is {found!r}; leave it out to follow that"
            )
        changes[f"model.{name}"] = found
    for name in ("context_length", "vocab_size"):
        if not cfg.model[name]:
            changes[f"model.{name}"] = theirs[name]
    no_wish = cfg.data.tokenizer == "bytes" and not cfg.data.source.endswith(".bin")  # which brings its own
    tokenizer = None
    try:
        tokenizer = read_tokenizer(located)
    except DataError:
        if no_wish:
            raise
    if no_wish and not isinstance(tokenizer, Bytes):
        changes["data.tokenizer"] = spec if located.step is None else str(located.folder)
    followed = config.resolve(config.override(cfg, changes))
    taken = [f"{path} {now!r}" for path, (_, now) in config.differences(cfg, followed).items()]
    step = "" if located.step is None else f", step {located.step}"
    said = [f"initial parameters from {spec!r}{step}" + (f"; with them {', '.join(taken)}" if taken else "")]
    return followed, Source(located, source, tokenizer, said)


def taken_over(cfg: FrozenConfigDict, workdir: Path) -> FrozenConfigDict | None:
    """The config with what it took over from its `init_from` when the run in a directory began: one that has a
    checkpoint needs its source no more. None where no such run has one there."""
    if not StepFolders(workdir / rundir.CHECKPOINTS, writable=False).steps() or not (workdir / "config.json").exists():
        return None
    then, usual = rundir.read_config(workdir), config.default()
    if then.init_from != cfg.init_from:
        return None
    fields = [f"model.{name}" for name in FOLLOWS if cfg.model[name] == usual.model[name]]
    fields += [f"model.{name}" for name in ("context_length", "vocab_size") if not cfg.model[name]]
    fields += ["data.tokenizer"] if cfg.data.tokenizer == usual.data.tokenizer else []
    known = config.flat(then)
    return config.resolve(config.override(cfg, {name: known[name] for name in fields}))


def params(cfg: FrozenConfigDict, source: Source, tokenizer: Tokenizer) -> tuple[PyTree, list[str]]:
    """The source's parameters in the shapes and dtype of a config that follows it; and lines to say.

    Args:
      tokenizer: that of the run's data, which is compared with the source's.

    Raises:
      DataError: the parameters are damaged, or are not those of the source's config.
    """
    out, said = read_params(source.located, source.config), list(source.said)
    key, _ = jax.random.split(jax.random.key(cfg.seed))  # the one that draws parameters where there is no source
    out, resized = resize(lora.merged(out, source.config.model.lora), source.config.model, cfg.model, key)
    out = lora.added(out, cfg.model.lora, key)
    if source.tokenizer is None:
        said.append(f"{cfg.init_from!r} has no tokenizer that could be compared with that of the data")
    elif not _same(tokenizer, source.tokenizer):
        said.append(
            f"warning: the tokenizer of the data is not that of {cfg.init_from!r}: "
            "ids mean other text than its parameters have learnt"
        )
    return jax.tree.map(lambda x: x.astype(cfg.model.param_dtype), out), said + resized


def _same(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether ids mean the same text, as far as both know them; the same tokenizer may be spelled in several ways."""
    if a.fingerprint == b.fingerprint:
        return True
    return all(a.decode([i]) == b.decode([i]) for i in range(min(a.vocab_size, b.vocab_size)))
