"""A trained model from where it lies."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import FrozenConfigDict

from jaxlm.data.tokenizers import Tokenizer
from jaxlm.errors import DataError
from jaxlm.training import rundir, step
from jaxlm.training.checkpoint import Checkpoints
from jaxlm.training.step import Program, State


class Loaded(NamedTuple):
    program: Program
    state: State
    tokenizer: Tokenizer
    config: FrozenConfigDict


def load(checkpoint: str | Path) -> Loaded:
    """The program, state, tokenizer and config of a run directory (its latest step) or of one step's directory.

    Raises:
      DataError: nothing of the kind is there, or it is damaged.
    """
    path = Path(checkpoint)
    workdir, wanted = path, None
    if path.name.isdigit() and path.parent.name == "checkpoints":
        workdir, wanted = path.parent.parent, int(path.name)
    if not workdir.is_dir():
        raise DataError(f"no checkpoint at {str(checkpoint)!r}; give a run directory, or <run>/checkpoints/<step>")
    cfg = rundir.read_config(workdir)
    if not (workdir / "checkpoints").is_dir():
        raise DataError(f"run directory {str(workdir)!r} has no checkpoints yet")
    structure, hparams = step.split(cfg)
    program = step.build(structure)
    with Checkpoints(workdir / "checkpoints", writable=False) as checkpoints:
        shapes = jax.eval_shape(program.init, jax.random.key(cfg.seed), hparams)
        state = checkpoints.restore(shapes, wanted).state
    return Loaded(program, state, rundir.read_tokenizer(workdir), cfg)
