"""A model from where it lies: a run directory or one step of it, a Hugging Face directory, or the hub."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
from ml_collections import FrozenConfigDict

from jaxlm import config, data, hub
from jaxlm.data import TokenFile, paths, tokenizer_export, tokenizer_specs
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import ConfigError, DataError, nearest
from jaxlm.files import expanded
from jaxlm.model import gpt2, huggingface, huggingface_config
from jaxlm.optim.wrappers import averages, evaluation_params, of_stored
from jaxlm.training import checkpoint_flags, position, rundir
from jaxlm.training.checkpoint import Checkpoints
from jaxlm.training.step import PyTree
from jaxlm.training.step_folders import Gone

EXPECTED = f"expected {checkpoint_flags.WHERE} such as 'gpt2'"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model")
Value = TypeVar("Value")


class Located(NamedTuple):
    folder: Path  # a run directory or a Hugging Face directory
    step: int | None  # of the run; None for a Hugging Face directory


class Loaded(NamedTuple):
    model: gpt2.Model
    params: PyTree  # on the first device
    tokenizer: Tokenizer
    config: FrozenConfigDict  # the run's; of a Hugging Face directory, the defaults with its model and tokenizer


def load(spec: str | Path, weights: str = "") -> Loaded:
    """The model, parameters, tokenizer and config of a run directory (its latest step, with early stopping the best
    one kept), of `<run>/checkpoints/<step>`, of a Hugging Face directory, or of a hub id: from the local cache if it
    is there.

    Args:
      weights: which parameters: "" are a run's result, "ema" the average that `ema_of_params` kept beside them, of
        which evaluations report eval/ema_loss and the like.

    Raises:
      ConfigError: there is no such average.
      DataError: nothing of the kind is there, or it is damaged, or the tokenizer has more ids than the model.
    """
    return load_located(spec, weights)[1]


def load_located(spec: str | Path, weights: str = "") -> tuple[Located, Loaded]:
    """What `load` gives, and where it was found. Looks twice, where a run that goes on removes what is being read."""

    def found() -> tuple[Located, Loaded]:
        where = locate(spec)
        return where, _load(spec, where, weights)

    return _again(found)


def _again(read: Callable[[], Value]) -> Value:
    try:
        return read()
    except (Gone, FileNotFoundError):  # the latter of Orbax, which lists all steps
        return read()


def _load(spec: str | Path, located: Located, weights: str) -> Loaded:
    cfg, tokenizer = read_config(spec, located), read_tokenizer(located)
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise DataError(
            f"the tokenizer in {located.folder} has {tokenizer.vocab_size:,} ids, its model only "
            f"{cfg.model.vocab_size:,}: they don't belong together"
        )
    if located.step is None and (begin := tokenizer_export.begins(tokenizer)):
        what = f"the tokenizer of {str(spec)!r} begins a text with {begin!r}, and here one follows the end of another"
        print(f"warning: {what}; to begin a prompt with {begin!r}, write it there", file=sys.stderr)
    return Loaded(gpt2.build(cfg.model, strict=False), read_params(located, cfg, weights), tokenizer, cfg)


def held_out(located: Located, cfg: FrozenConfigDict, tokenizer: Tokenizer) -> TokenFile:
    """The tokens that a run held out.

    Args:
      located: a step of the run.
      cfg, tokenizer: the run's, as `load` gives them.

    Raises:
      ConfigError: it held out none.
      DataError: its data is gone, or has changed.
    """
    opened = data.open(cfg.data, progress=True)
    if opened.tokenizer.fingerprint != tokenizer.fingerprint:
        raise DataError(f"data.source={cfg.data.source!r} has changed since the run, and its tokenizer; give --data")
    if opened.validation is None:
        raise ConfigError("the run held out no text; give --data=PATH")
    assert located.step is not None
    with Checkpoints(located.folder / rundir.CHECKPOINTS, writable=False) as checkpoints:
        then = checkpoints.data(located.step)
    if then.get("tokens", opened.train.sha256) != opened.train.sha256:  # what is held out now may be of these
        what = f"the training tokens of data.source={cfg.data.source!r}"
        raise DataError(f"{what} have changed since the run; give --data")
    if then.get("validation") and then["validation"] != opened.validation.sha256:
        what = f"the held-out text, data.validation={cfg.data.validation!r},"
        print(f"warning: {what} is not that of the training: it has changed since", file=sys.stderr)
    return opened.validation


def locate(spec: str | Path) -> Located:
    """Where a model lies; of a hub id, in the local cache, into which it is fetched where that is possible.

    Raises:
      DataError: as `load`; ConfigError: an empty name.
    """
    if not str(spec).strip():  # as of a shell variable that isn't set; a path would be this very folder
        raise ConfigError(f"the checkpoint's name is empty; {EXPECTED}")
    folder, wanted = expanded(spec), None
    if folder.name.isdecimal() and folder.parent.name == rundir.CHECKPOINTS:
        folder, wanted = folder.parent.parent, int(folder.name)
    if not folder.is_dir():
        if folder.exists():
            raise DataError(f"{str(spec)!r} is not a folder; {EXPECTED}")
        if not hub.is_id(str(spec)) or (folder.parent != Path(".") and folder.parent.is_dir()):
            raise DataError(f"no checkpoint at {str(spec)!r}: {paths.missing(folder)}; {EXPECTED}")
        return Located(_fetched(str(spec)), None)
    described = _description(folder)
    if "model_type" in described:
        return Located(folder, None)
    if "init_from" not in described:
        raise DataError(f"{folder / 'config.json'} is no run's, and names no model_type of Hugging Face's; {EXPECTED}")
    with Checkpoints(folder / rundir.CHECKPOINTS, writable=False) as checkpoints:
        found = _again(lambda: checkpoints.whole(_result(folder, checkpoints) if wanted is None else wanted, "params"))
    for line in (told := checkpoints.tell()):
        print(line, file=sys.stderr)
    if found is None:
        what = "no whole checkpoint" if told else "no checkpoints yet"
        raise DataError(f"run directory {str(folder)!r} has {what}")
    return Located(folder, found)


def _result(folder: Path, checkpoints: Checkpoints) -> int | None:
    """The step that is the result of a run, where that is not its latest. The last checkpoint tells it: what else is
    in a run's directory may be lost, or from another time. Of one that can't tell, the latest step would be a guess."""
    cfg = rundir.read_config(folder)
    if not (steps := checkpoints.steps()) or not position.may_be_best(cfg):
        return None
    last = position.of_json(checkpoints.data(steps[-1]))
    result = position.result(last, cfg, steps[-1])
    if result and result not in steps:
        raise DataError(
            f"the result of {str(folder)!r} is its best step, {result}, and that checkpoint is "
            f"gone; name one that is there: {', '.join(str(checkpoints.folder(step)) for step in steps)}"
        )
    return result


def read_config(spec: str | Path, located: Located) -> FrozenConfigDict:
    """The resolved config of what `spec` names."""
    if located.step is not None:
        return rundir.read_config(located.folder)
    described = {f"model.{name}": value for name, value in huggingface_config.fields(located.folder).items()}
    return config.resolve(config.override(config.default(), described | {"data.tokenizer": str(spec)}))


def read_tokenizer(located: Located) -> Tokenizer:
    """The run's tokenizer, or the one in the Hugging Face directory."""
    if located.step is not None:
        return rundir.read_tokenizer(located.folder)
    if not any((located.folder / name).is_file() for name in TOKENIZER_FILES):
        raise DataError(f"{located.folder} has no tokenizer; put the tokenizer.json there that belongs to the model")
    return tokenizer_specs.build(str(located.folder))


def read_params(located: Located, cfg: FrozenConfigDict, weights: str = "") -> PyTree:
    """The parameters on the first device; nothing else of a run's step is read, so no optimizer state.

    But of an average, which is what `weights` names or what the optimizer means as its result (schedule-free), all is
    read. Which there are the step itself says, since its optimizer may be a Python object, which no config.json holds.

    Args:
      cfg: of `read_config`.
      weights: as `load` takes it.

    Raises:
      ConfigError, DataError: as `load`.
    """
    if located.step is None:
        _check_weights(weights, set(), located.folder)
        leaves, treedef = jax.tree.flatten(huggingface.read(located.folder, cfg.model))
        for i, leaf in enumerate(leaves):  # one by one, so that there are not two of each for long
            leaves[i] = jax.device_put(leaf)  # a copy only where it must be
        return jax.tree.unflatten(treedef, leaves)
    with Checkpoints(located.folder / rundir.CHECKPOINTS, writable=False) as checkpoints:
        kept = averages(of_stored(checkpoints.opt_state_shapes(located.step)))
        _check_weights(weights, kept, checkpoints.folder(located.step))
        params = checkpoints.params(gpt2.shapes(cfg.model), located.step)
        if weights not in kept:
            return params
        return evaluation_params(of_stored(checkpoints.opt_state(located.step)), params)[weights]


def _check_weights(weights: str, kept: set[str], where: Path) -> None:
    if weights and weights not in kept:
        what = f"weights is {weights!r}, and {where} has no such average: {nearest(weights, kept - {''})}"
        raise ConfigError(f"{what}; a run keeps one, 'ema', where its optimizer.chain ends with ema_of_params")


def _fetched(name: str) -> Path:
    """The folder of a hub id."""
    files = ("*.json", "*.jinja", "*.safetensors", *TOKENIZER_FILES)
    try:
        return hub.snapshot(name, files, needed=("config.json", "*.safetensors"))
    except DataError as error:
        raise DataError(f"no checkpoint at {name!r}: {paths.missing(name)}. As a hub id: {error}") from error


def _description(folder: Path) -> dict[str, Any]:
    """config.json of a run or of a Hugging Face directory."""
    file = folder / "config.json"
    if file.exists() and not file.is_file():  # a pipe would keep its reader waiting
        raise DataError(f"{file} is not a file; {EXPECTED}")
    try:
        raw = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        near = [path for path in (folder.parent, *sorted(folder.iterdir())) if (path / "config.json").is_file()]
        hint = f" Did you mean {str(near[0])!r}?" if near else ""
        raise DataError(f"{str(folder)!r} has no config.json; {EXPECTED}.{hint}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"can't read {file}: {error}") from error
    if not isinstance(raw, dict):
        raise DataError(f"{file} holds no JSON object; {EXPECTED}")
    return raw
