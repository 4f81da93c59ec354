import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
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


def test_parameters_alone_have_the_same_bits(tmp_path, trained):
    cfg, state = trained
    shapes = jax.eval_shape(lambda: state.params)
    doubled = jax.tree.map(lambda x: 2 * x, state.params)
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        for n, params in ((1, state.params), (2, doubled)):
            checkpoints.save(at(state, n)._replace(params=params), {}, cfg, {})
            checkpoints.wait()
            assert_same_bits(checkpoints.params(shapes), params)
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)
    with Checkpoints(tmp_path / "c", writable=False) as checkpoints:
        assert_same_bits(checkpoints.params(placed, 1), state.params)
        assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(checkpoints.params(placed)))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's count of bytes read")
def test_parameters_alone_are_read_without_the_optimizer(tmp_path, trained):
    def read_by(restore):
        def count():
            return int(Path("/proc/self/io").read_text().split()[1])

        before = count()
        restore()
        return count() - before

    cfg, state = trained
    random = np.random.default_rng(0).random(2**20)  # 8 MB that hardly compress
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state._replace(opt_state=jnp.asarray(random.view(np.uint32))), {}, cfg, {})
        checkpoints.wait()
        like = jax.eval_shape(lambda: state._replace(opt_state=random.view(np.uint32)))
        assert read_by(lambda: checkpoints.restore(like)) > 7e6
        assert read_by(lambda: checkpoints.params(like.params)) < 1e6


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
        for refused, message in ((half, "expects bfloat16"), (state.params | {"new": jnp.zeros(2)}, "'params/new'")):
            with pytest.raises(DataError, match=message):
                checkpoints.params(refused)
        with pytest.raises(DataError, match="no checkpoint of step 5 .*there are: 4"):
            checkpoints.params(state.params, 5)


def test_a_damaged_step_is_an_error_that_names_the_others(tmp_path, trained):
    cfg, state = trained
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        for n in (1, 2):
            checkpoints.save(at(state, n), {}, cfg, {})
            checkpoints.wait()
        for file in (tmp_path / "c" / "2" / "state").rglob("*"):
            if file.is_file() and file.stat().st_size > 1000:
                file.write_bytes(file.read_bytes()[:100])
        for read in (lambda: checkpoints.restore(state), lambda: checkpoints.params(state.params)):
            with pytest.raises(DataError, match=r"c/2 is damaged.*others that are there: 1$"):
                read()
        assert int(checkpoints.restore(state, 1).state.step) == 1


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
