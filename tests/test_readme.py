"""The README's configs are configs, and its loop is one."""

import re
from pathlib import Path

import jax
import pytest

from jaxlm import config
from jaxlm.training import sanity, step
from tests.tiny import batch, tiny

README = (Path(__file__).parents[1] / "README.md").read_text()
OPTIMIZERS = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "c.optimizer.chain" in block]


@pytest.mark.parametrize("block", OPTIMIZERS, ids=lambda block: re.findall(r'"(\w+)"', block)[0])
def test_an_optimizer_of_the_readme_trains(block):
    c = tiny(model__vocab_size=257)
    exec(block, {"c": c})
    c.init_from = ""  # a hub's
    cfg = config.resolve(c)
    assert sanity.check(cfg) == []
    structure, hparams = step.split(cfg)
    program = step.build(structure)
    state = jax.eval_shape(program.init, jax.random.key(0), hparams)
    after, metrics = jax.eval_shape(program.train_step, hparams, state, batch())
    assert after == state and "optim/learning_rate" in metrics


def test_there_are_such():
    assert len(OPTIMIZERS) >= 3


def test_the_loop_of_the_readme_trains():
    [block] = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "jax.vmap" in block]
    names = {"c": tiny(), "config": config}
    exec(block, names)
    assert int(names["state"].step) == 3 and int(names["states"].step[1]) == 1
    first, second = names["metrics"]["optim/learning_rate"]
    assert second == pytest.approx(10 * first)
