from types import SimpleNamespace

import jax
import pytest

from jaxlm.errors import ConfigError
from jaxlm.training import devices, memory, parallel, step
from tests.tiny import batch, resolved

SHAPE = dict(model__num_layers=4, model__embed_dim=128, model__num_heads=4, model__context_length=128)


def temporary(cfg):
    """Bytes of a step's buffers, by the compiler."""
    structure, hparams = step.split(cfg)
    program = step.build(structure)
    state = jax.eval_shape(program.init, jax.random.key(0), hparams)
    step_fn = parallel.compile(program.train_step, devices.mesh(cfg), donate=(1,))
    compiled = step_fn.lower(hparams, state, batch(16, 128)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", ["none", "dots", "block"])
def test_the_estimate_is_near_what_the_compiler_says(remat):
    """Within a factor of 1.6, at a size where the rule of thumb was not made."""
    cfg = resolved(**SHAPE, model__unroll=False, model__remat=remat, data__batch_size=16)
    parts = memory.estimate(cfg)
    expected = parts["gradients"] + parts["activations"] + parts["logits"]
    assert 1 / 1.6 < temporary(cfg) / expected < 1.6
    assert parts["optimizer"] == pytest.approx(2 * parts["parameters"], rel=0.01)


@pytest.mark.parametrize("unroll", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_remat_needs_less_of_the_compiler_too(unroll):
    none, block = (
        temporary(resolved(**SHAPE, model__unroll=unroll, model__remat=remat, data__batch_size=16))
        for remat in ("none", "block")
    )
    assert block < 0.6 * none


def test_less_of_a_batch_at_once_and_remat_need_less():
    def activations(**changes):
        return memory.estimate(resolved(**changes))["activations"]

    assert activations(data__micro_batches=2) == activations() // 2
    assert activations(model__remat="block") < activations(model__remat="dots") < activations()


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="INTERNAL"), memory.explained(resolved()):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
    with pytest.raises(ConfigError, match="out of memory: RESOURCE_EXHAUSTED: no room. A step takes about"):
        with memory.explained(resolved()):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room.")


def test_a_lack_of_this_machine_s_memory_is_explained_too():
    with pytest.raises(ConfigError, match="out of memory: no memory is left. A step takes about"):
        with memory.explained(resolved()):
            raise MemoryError


def test_out_of_memory_is_explained_under_pmap_too():
    cfg = resolved(parallel__mode="pmap")
    with pytest.raises(ConfigError, match="out of memory"), memory.explained(cfg, devices.replicas(cfg)):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room.")


@pytest.mark.parametrize(("limit", "free", "room"), [(1000, 4, 900), (None, 4000, 3600)])
def test_the_room_is_a_share_of_a_device_or_of_what_is_free(monkeypatch, limit, free, room):
    stats = {"bytes_limit": limit} if limit else None
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda: stats)])
    monkeypatch.setattr(memory, "available", lambda: free)
    assert memory.room(0.9) == room
