"""Where a run begins: `init_from`, another model, whose architecture the config follows, or a run, to branch off."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import FrozenConfigDict

from jaxlm import config, hub
from jaxlm.data.tokenizers import Bytes, Tokenizer
from jaxlm.errors import ConfigError, DataError
from jaxlm.model import huggingface_config, lora
from jaxlm.model.resize import resize
from jaxlm.training import position, rundir
from jaxlm.training.checkpoint import Checkpoints
from jaxlm.training.load import Located, locate, read_config, read_params, read_tokenizer
from jaxlm.training.step import PyTree, State
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


class Beginning(NamedTuple):
    """What a run begins with: another run's state, or parameters, or None of both, and some are drawn from its seed."""

    params: PyTree | None = None
    state: State | None = None
    sequences: int = 0  # of its data, that the state has seen


def follow(cfg: FrozenConfigDict) -> tuple[FrozenConfigDict, Source]:
    """The config with the architecture of its `init_from`, and with its context, vocabulary and tokenizer where it
    names none. A folder that may be taken for a hub id where it is not, as of an export, is written as "./folder".

    No parameter is read.

    Raises:
      ConfigError: the config asks for another architecture.
      DataError: there is no such model.
    """
    if hub.is_id(cfg.init_from) and Path(cfg.init_from).exists():
        cfg = config.resolve(config.override(cfg, {"init_from": f"./{cfg.init_from}"}))
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
    theirs = {"dropout": source.model.dropout}
    if located.step is None:
        theirs = huggingface_config.dropouts(located.folder)
    if {*theirs.values()} != {cfg.model.dropout}:
        listed = ", ".join(f"{name} {value}" for name, value in theirs.items())
        said.append(f"model.dropout is {cfg.model.dropout}, and {spec!r} was trained with {listed}")
    return followed, Source(located, source, tokenizer, said)


def taken_over(cfg: FrozenConfigDict, workdir: Path) -> FrozenConfigDict | None:
    """The config with what it took over from its `init_from` when the run in a directory began: one that has a
    checkpoint needs its source no more. None where no such run has one there."""
    if not StepFolders(workdir / rundir.CHECKPOINTS, writable=False).steps() or not (workdir / "config.json").exists():
        return None
    then, usual = rundir.read_config(workdir), config.default()
    if not then.init_from or Path(then.init_from) != Path(cfg.init_from):  # of which ./ is no part
        return None
    fields = ["init_from"]
    fields += [f"model.{name}" for name in FOLLOWS if cfg.model[name] == usual.model[name]]
    fields += [f"model.{name}" for name in ("context_length", "vocab_size") if not cfg.model[name]]
    fields += ["data.tokenizer"] if cfg.data.tokenizer == usual.data.tokenizer else []
    known = config.flat(then)
    return config.resolve(config.override(cfg, {name: known[name] for name in fields}))


def begin(
    cfg: FrozenConfigDict, source: Source, tokenizer: Tokenizer, tokens: str, like: State
) -> tuple[Beginning, list[str]]:
    """What a run from `init_from` begins with; and lines to say.

    Args:
      tokenizer: that of the run's data, which is compared with the source's.
      tokens: sha256 of the run's training tokens.
      like: the run's state, in shapes, with shardings.

    Raises:
      ConfigError: a branch is to end before it begins, or the source is no run of jaxlm.
      DataError: what is read is damaged, or is not of the source's config, or a branch is of another structure.
    """
    said = list(source.said)
    if source.tokenizer is None:
        said.append(f"{cfg.init_from!r} has no tokenizer that could be compared with that of the data")
    elif not _same(tokenizer, source.tokenizer):
        said.append(
            f"warning: the tokenizer of the data is not that of {cfg.init_from!r}: "
            "ids mean other text than its parameters have learnt"
        )
    found, more = _branch(cfg, source, tokens, like) if cfg.init_state else _parameters(cfg, source)
    return found, said + more


def _parameters(cfg: FrozenConfigDict, source: Source) -> tuple[Beginning, list[str]]:
    """The source's in the shapes and dtype of a config that follows it."""
    out = read_params(source.located, source.config)
    key, _ = jax.random.split(jax.random.key(cfg.seed))  # the one that draws parameters where there is no source
    out, resized = resize(lora.merged(out, source.config.model.lora), source.config.model, cfg.model, key)
    out = lora.added(out, cfg.model.lora, key, cfg.model.vocab_size)
    return Beginning(params=jax.tree.map(lambda x: x.astype(cfg.model.param_dtype), out)), resized


def _branch(cfg: FrozenConfigDict, source: Source, tokens: str, like: State) -> tuple[Beginning, list[str]]:
    """The source's whole state. Its root key becomes that of the config's seed, as where a run begins anew: of another
    seed than the source's, dropout and the order of the data are others from here on."""
    located = source.located
    if located.step is None:
        raise ConfigError(f"init_state=True needs the state of a run, and init_from={cfg.init_from!r} is a model alone")
    if located.step >= cfg.steps:
        raise ConfigError(
            f"init_from={cfg.init_from!r} has {located.step} steps, and steps={cfg.steps} counts these too: "
            "give the number at which the branch is to end"
        )
    with Checkpoints(located.folder / rundir.CHECKPOINTS, writable=False) as checkpoints:
        checkpoints.whole(located.step)
        try:
            restored = checkpoints.restore(like, located.step)
        except DataError as error:
            kept = "A branch keeps its source's optimizer stages, and a schedule where the source has one, nowhere else"
            what = f"{error}. {kept}. With init_state=False a run begins with the parameters alone"
            raise DataError(what) from error
    _, root = jax.random.split(jax.random.key(cfg.seed))  # as where a run begins anew
    then = position.of_json(restored.data)
    if then.tokens == tokens:
        seen, where = then.sequences, f"goes on with sequence {then.sequences:,} of its data"
    else:
        seen, where = 0, "begins with the first sequence of its own data"
    if cfg.seed != source.config.seed:
        where += f", in the order of seed {cfg.seed}"
    state = restored.state._replace(key=jax.device_put(root, like.key.sharding))
    return Beginning(state=state, sequences=seen), [f"a branch of it at step {located.step}, which {where}"]


def _same(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether ids mean the same text, as far as both know them; the same tokenizer may be spelled in several ways."""
    if a.fingerprint == b.fingerprint:
        return True
    return all(a.decode([i]) == b.decode([i]) for i in range(min(a.vocab_size, b.vocab_size)))
