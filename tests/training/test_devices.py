import types

import jax
import pytest

from jaxlm.errors import ConfigError
from jaxlm.training import devices, memory, parallel
from tests.tiny import resolved

GB = 10**9
WIDE = dict(model__num_heads=4, model__embed_dim=64, data__batch_size=48)


def shape(count, bytes_each=None, **changes):
    return devices.shape(resolved(**WIDE | {f"parallel__{axis}": n for axis, n in changes.items()}), count, bytes_each)


def test_data_takes_the_devices_that_are_left():
    assert shape(8) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert shape(8, tensor=2) == {"data": 4, "fsdp": 1, "tensor": 2}
    assert shape(8, fsdp=2, tensor=4) == {"data": 1, "fsdp": 2, "tensor": 4}
    assert shape(8, data=2, fsdp=2) == {"data": 2, "fsdp": 2, "tensor": 1}  # fewer than there are


def test_parameters_are_divided_only_as_far_as_memory_asks_for():
    cfg = resolved(**WIDE)

    def needed(fsdp):
        mesh = jax.sharding.AbstractMesh((8 // fsdp, fsdp, 1), parallel.AXES)
        return sum(memory.estimate(cfg, mesh).values())

    assert needed(1) > needed(2) > needed(4) > needed(8)
    assert shape(8, needed(1) + 1)["fsdp"] == 1
    assert shape(8, needed(2) + 1) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert shape(8, needed(8) + 1) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert shape(8, 1)["fsdp"] == 8  # the best there is
    assert shape(8, 1, fsdp=1)["fsdp"] == 1  # as it is asked for
    assert shape(8, None)["fsdp"] == 1
    assert shape(8, 1, data=2) == {"data": 2, "fsdp": 4, "tensor": 1}


def test_the_estimate_counts_what_a_device_holds():
    cfg = resolved(**WIDE)
    alone, eighth = memory.estimate(cfg), memory.estimate(cfg, jax.sharding.AbstractMesh((1, 8, 1), parallel.AXES))
    for part in ("activations", "logits"):
        assert eighth[part] == pytest.approx(alone[part] / 8, rel=1e-3)
    for part in ("parameters", "optimizer", "gradients"):
        assert alone[part] / 8 < eighth[part] < alone[part] / 7  # biases and norms lie whole


@pytest.mark.parametrize(
    ("count", "changes", "message"),
    [
        (1, {"data": 64}, "parallel.data=64, parallel.fsdp=1, parallel.tensor=1 are 64 devices; JAX sees 1"),
        (8, {"data": 1, "fsdp": 64}, "are 64 devices; JAX sees 8"),
        (8, {"fsdp": 64}, "parallel.data=-1 takes all devices, and JAX sees 8, which .*, here 64, does not divide"),
        (8, {"fsdp": 3}, "parallel.data=-1 takes all devices, and JAX sees 8, which .*, here 3, does not divide"),
        (1, {"tensor": 3}, "parallel.data=-1 takes all devices, and JAX sees 1, which .*, here 3, does not divide"),
        (8, {"tensor": 8}, "parallel.tensor=8 does not divide model.num_heads=4"),
        (48, {"fsdp": 48}, "parallel.fsdp=48 does not divide model.embed_dim=64"),
        (32, {}, "data.batch_size=48 does not divide into 1 micro-batches over 32 devices"),
    ],
)
def test_an_arrangement_that_does_not_fit_is_refused(count, changes, message):
    with pytest.raises(ConfigError, match=message):
        shape(count, **changes)


def test_a_batch_divides_into_micro_batches_over_devices():
    cfg = resolved(data__batch_size=4, data__micro_batches=2)
    assert devices.shape(cfg, 2, None)["data"] == 2
    with pytest.raises(ConfigError, match="data.batch_size=4 does not divide into 2 micro-batches over 4 devices"):
        devices.shape(cfg, 4, None)


def test_an_arrangement_of_more_devices_than_there_are_can_be_thought_of():
    cfg = resolved(**WIDE, parallel__data=3, parallel__fsdp=4, parallel__tensor=2)
    assert dict(devices.imagined(cfg).shape) == {"data": 3, "fsdp": 4, "tensor": 2}
    with pytest.raises(ConfigError, match="are 24 devices; JAX sees 1"):
        devices.mesh(cfg)


def test_a_process_without_a_device_is_refused(monkeypatch):
    there = [types.SimpleNamespace(process_index=i // 2) for i in range(4)]
    monkeypatch.setattr(jax, "devices", lambda: there)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    message = "parallel.data=2, parallel.fsdp=1, parallel.tensor=1 take 2 of 4 devices, none of process 1: set"
    with pytest.raises(ConfigError, match=message):
        devices.mesh(resolved(**WIDE, parallel__data=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fsdp": 2}, "parallel.mode='pmap' holds all parameters on each device; parallel.fsdp=2"),
        ({"deterministic": True}, "parallel.deterministic=True is not told to jax.pmap's compiler"),
        ({"tensor": 2}, "parallel.tensor=2 divide them: use parallel.mode='jit'"),
        ({"data": 64}, "parallel.data=64 are more devices than the 1 that JAX sees"),
    ],
)
def test_pmap_divides_rows_alone(changes, message):
    with pytest.raises(ConfigError, match=message):
        devices.replicas(resolved(**{f"parallel__{axis}": n for axis, n in changes.items()}))


def test_pmap_is_for_one_process(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="parallel.mode='pmap' is for one process, and there are 2"):
        devices.replicas(resolved())


@pytest.fixture
def gpu(monkeypatch):
    """(device_kind, version): as if JAX, of that version, saw such GPUs."""

    def see(kind, version=(0, 11, 1)):
        monkeypatch.setattr(jax, "__version_info__", version)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])

    return see


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__dtype": "bfloat16"}, []),
        ({"model__dtype": "bfloat16", "model__dropout": 0.1}, ["blocks: cuDNN's has no dropout"]),
        ({"model__dtype": "bfloat16", "model__attention": "blockwise"}, ["blocks: model.attention='blockwise'"]),
        ({}, ["blocks: cuDNN's wants a GPU of NVIDIA's since Ampere, bfloat16 or float16, a head dimension that is"]),
    ],
)
def test_attention_that_is_not_cudnns_is_told_on_a_gpu(gpu, changes, said):
    gpu("NVIDIA H200")
    remarks = devices.remarks(resolved(**WIDE | changes))
    assert len(remarks) == len(said) and all(one in remark for one, remark in zip(said, remarks))


def test_cudnns_attention_that_can_t_serve_is_an_error_before_a_run_begins():
    with pytest.raises(ConfigError, match="model.attention='cudnn' can't serve here: cuDNN's wants .*='auto'$"):
        devices.remarks(resolved(**WIDE, model__attention="cudnn"))


def test_a_jax_that_is_slow_on_gpus_is_warned_of(gpu):
    gpu("NVIDIA H200", (0, 11, 0))
    (remark,) = devices.remarks(resolved(**WIDE, model__dtype="bfloat16"))
    assert remark.startswith("warning: JAX ") and "the embedding's gradient slowly on GPUs" in remark


def test_a_peak_that_is_not_known_is_told(gpu):
    gpu("NVIDIA Z1")
    (remark,) = devices.remarks(resolved(**WIDE, model__dtype="bfloat16"))
    assert remark == "warning: no MFU: the peak of 'NVIDIA Z1' in bfloat16 is not known"


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="GPUs keep apart what is to be computed twice")
def test_remat_that_saves_nothing_is_warned_of():
    remat = {"model__remat": "block"}
    assert devices.remarks(resolved(**remat, model__unroll=False)) == []
    (remark,) = devices.remarks(resolved(**remat))
    assert remark.startswith("warning: model.remat='block' saves no memory on a CPU with model.unroll=True")
