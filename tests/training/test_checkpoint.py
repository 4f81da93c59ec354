import shutil

import jax
import jax.numpy as jnp
import pytest

from jaxlm.errors import DataError
from jaxlm.training import step
from jaxlm.training.checkpoint import Checkpoints
from tests.tiny import assert_same_bits, batch, resolved


@pytest.fixture(scope="module")
def trained():
    cfg = resolved(model__dtype="bfloat16")
    structure, hparams = step.split(cfg)
    program = step.build(structure)
    state = jax.jit(program.init)(jax.random.key(3), hparams)
    state, _ = jax.jit(program.train_step)(hparams, state, batch())
    return cfg, state


def at(state, n):
    return state._replace(step=jnp.int32(n))


def test_what_is_restored_has_the_bits_of_what_was_saved(tmp_path, trained):
    cfg, state = trained
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state, {"sequences": 4}, cfg, {})
    with Checkpoints(tmp_path / "c", writable=False) as checkpoints:
        restored = checkpoints.restore(jax.eval_shape(lambda: state))
    assert_same_bits(restored.state, state)
    assert restored.data == {"sequences": 4}


def test_the_latest_and_the_best_stay(tmp_path, trained):
    cfg, state = trained
    with Checkpoints(tmp_path / "c", keep=2, best="eval/loss") as checkpoints:
        for n, loss in enumerate([5.0, 1.0, 4.0, float("nan"), 3.0]):
            checkpoints.save(at(state, n), {}, cfg, {"eval/loss": loss})
            checkpoints.wait()
        assert checkpoints.steps() == [1, 3, 4]


def test_a_step_that_is_there_is_left_as_it_is(tmp_path, trained):
    cfg, state = trained
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state, {"n": 1}, cfg, {})
        checkpoints.save(state, {"n": 2}, cfg, {})
        checkpoints.wait()
        assert checkpoints.restore(state).data == {"n": 1}


def test_a_half_written_step_is_not_one_and_is_removed(tmp_path, trained):
    cfg, state = trained
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(at(state, 1), {}, cfg, {})
    shutil.copytree(tmp_path / "c" / "1", tmp_path / "c" / "2")
    (tmp_path / "c" / "2" / "commit_success.txt").unlink()
    (tmp_path / "c" / "7").mkdir()
    with Checkpoints(tmp_path / "c", writable=False) as checkpoints:
        assert checkpoints.steps() == [1]
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.steps() == [1]
        assert int(checkpoints.restore(state).state.step) == 1


def test_missing_steps_and_other_parameters_are_named(tmp_path, trained):
    cfg, state = trained
    with Checkpoints(tmp_path / "c") as checkpoints:
        with pytest.raises(DataError, match="no checkpoint in .*there are: none"):
            checkpoints.restore(state)
        checkpoints.save(at(state, 4), {}, cfg, {})
        checkpoints.wait()
        with pytest.raises(DataError, match="no checkpoint of step 5 .*there are: 4"):
            checkpoints.restore(state, 5)
        wte = {"embedding": jnp.zeros((384, 8))}
        with pytest.raises(DataError, match=r"float32\[384, 16\] as 'params/wte/embedding'.*float32\[384, 8\]"):
            checkpoints.restore(state._replace(params=state.params | {"wte": wte}))
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)
        with pytest.raises(DataError, match="expects bfloat16"):
            checkpoints.restore(state._replace(params=half))
        with pytest.raises(DataError, match="holds nothing as 'params/new'"):
            checkpoints.restore(state._replace(params=state.params | {"new": jnp.zeros(2)}))


def test_a_save_that_would_not_fit_writes_nothing(tmp_path, trained, monkeypatch):
    cfg, state = trained
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(at(state, 1), {}, cfg, {})
        checkpoints.wait()
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(DataError, match=r"can't be written to .*0 MB free.*needs"):
            checkpoints.save(at(state, 2), {}, cfg, {})
        assert checkpoints.steps() == [1]
