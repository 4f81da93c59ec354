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
        restored = checkpoints.restore(jax.eval_shape(lambda: state), checkpoints.whole())
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
            assert_same_bits(checkpoints.params(shapes, n), params)
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)
    with Checkpoints(tmp_path / "c", writable=False) as checkpoints:
        assert_same_bits(checkpoints.params(placed, 1), state.params)
        assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(checkpoints.params(placed, 2)))


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
        assert read_by(lambda: checkpoints.restore(like, 1)) > 7e6
        assert read_by(lambda: checkpoints.params(like.params, 1)) < 1e6


def test_the_latest_and_the_best_stay(tmp_path, trained):
    cfg, state = trained
    with Checkpoints(tmp_path / "c", keep=2, best="eval/loss") as checkpoints:
        for n, loss in enumerate([5.0, 1.0, 4.0, float("nan"), 3.0]):
            checkpoints.save(at(state, n), {}, cfg, {"eval/loss": loss})
            checkpoints.wait()
        assert checkpoints.steps() == [1, 3, 4]
    with Checkpoints(tmp_path / "c", keep=1, best="eval/bits_per_byte") as checkpoints:  # by another metric from now on
        for n, bits in enumerate([2.0, 3.0, 4.0], start=5):
            checkpoints.save(at(state, n), {}, cfg, {"eval/bits_per_byte": bits})
            checkpoints.wait()
        assert checkpoints.steps() == [5, 7]


def test_a_step_that_is_there_is_left_as_it_is(tmp_path, trained):
    cfg, state = trained
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state, {"n": 1}, cfg, {})
        checkpoints.save(state, {"n": 2}, cfg, {})
        checkpoints.wait()
        assert checkpoints.restore(state, 1).data == {"n": 1}


def test_a_half_written_step_is_not_one_and_is_removed(tmp_path, trained):
    cfg, state = trained
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(at(state, 1), {}, cfg, {})
    for half in ("2", "7.removed"):
        shutil.copytree(tmp_path / "c" / "1", tmp_path / "c" / half)
    (tmp_path / "c" / "2" / "commit_success.txt").unlink()
    (tmp_path / "c" / "2" / "manifest.json").unlink()
    (tmp_path / "c" / "8").mkdir()
    with Checkpoints(tmp_path / "c", writable=False) as checkpoints:
        assert checkpoints.steps() == [1] and checkpoints.whole() == 1
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.steps() == [1] and checkpoints.whole() == 1
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["1"] and checkpoints.tell() == []


def test_missing_steps_and_other_parameters_are_named(tmp_path, trained):
    cfg, state = trained
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.whole() is None
        with pytest.raises(DataError, match="no checkpoint of step 5 .*there are: none"):
            checkpoints.whole(5)
        checkpoints.save(at(state, 4), {}, cfg, {})
        checkpoints.wait()
        with pytest.raises(DataError, match="no checkpoint of step 5 .*there are: 4"):
            checkpoints.whole(5)
        wte = {"embedding": jnp.zeros((384, 8))}
        with pytest.raises(DataError, match=r"float32\[384, 16\] as 'params/wte/embedding'.*float32\[384, 8\]"):
            checkpoints.restore(state._replace(params=state.params | {"wte": wte}), 4)
        with pytest.raises(DataError, match="expects nothing"):
            checkpoints.restore(state._replace(opt_state=()), 4)
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)
        for refused, message in (
            (half, "expects bfloat16"),
            (state.params | {"new": jnp.zeros(2)}, "holds nothing as 'params/new'"),
        ):
            with pytest.raises(DataError, match=message):
                checkpoints.restore(state._replace(params=refused), 4)
            with pytest.raises(DataError, match=message):
                checkpoints.params(refused, 4)


def truncated(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file):
    file.write_bytes(b"")


def deleted(file):
    file.unlink()


def flipped(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncated, emptied, deleted, flipped])
def test_whatever_happens_to_a_file_of_a_step_the_one_before_is_used(tmp_path, trained, damage):
    """Every file of a checkpoint in turn."""
    cfg, state = trained
    with Checkpoints(tmp_path / "saved" / "c", keep=2) as checkpoints:
        for n in (1, 2):
            checkpoints.save(at(state, n), {"n": n}, cfg, {})
    files = [path.relative_to(tmp_path / "saved") for path in (tmp_path / "saved" / "c" / "2").rglob("*")]
    names = [name for name in files if (tmp_path / "saved" / name).is_file()]
    assert {name.parts[2] for name in names} >= {"params", "state", "data", "config", "manifest.json"}
    for i, name in enumerate(names):
        run = tmp_path / str(i)
        shutil.copytree(tmp_path / "saved", run)
        size = (run / name).stat().st_size
        damage(run / name)
        if damage in (emptied, truncated, flipped) and not size:
            continue
        with Checkpoints(run / "c", writable=False) as checkpoints:
            if 2 in checkpoints.steps():
                with pytest.raises(DataError, match=r"c/2 is damaged \(.*\); others that are there: 1$"):
                    checkpoints.whole(2)
            assert checkpoints.whole() == 1, name
        with Checkpoints(run / "c", keep=2) as checkpoints:
            assert checkpoints.whole() == 1, name
            [told] = checkpoints.tell()
            assert "c/2 is damaged (" in told and f"was moved to {run / 'damaged' / '2'}" in told
            assert (run / "damaged" / "2").is_dir()
            if i == 0:
                restored = checkpoints.restore(state, 1)
                assert_same_bits(restored.state, at(state, 1))
                checkpoints.save(at(state, 2), {"n": 2}, cfg, {})  # and the step comes again
        assert Checkpoints(run / "c", writable=False).whole() == (2 if i == 0 else 1)


def test_a_file_that_is_not_the_parameters_may_be_broken_when_only_these_are_read(tmp_path, trained):
    cfg, state = trained
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(at(state, 1), {}, cfg, {})
    largest = max((tmp_path / "c" / "1" / "state").rglob("*"), key=lambda path: path.stat().st_size)
    flipped(largest)
    with Checkpoints(tmp_path / "c", writable=False) as checkpoints:
        assert checkpoints.whole(item="params") == 1
        assert checkpoints.whole() is None


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
