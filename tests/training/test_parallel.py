import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import config
from jaxlm.errors import ConfigError
from jaxlm.training import parallel, step
from jaxlm.training.checkpoint import Checkpoints
from jaxlm.training.explain import explain
from jaxlm.training.prepare import prepare
from jaxlm.training.steps import Steps
from tests.runs import ROOT, rows
from tests.tiny import assert_same_bits, batch, leaves, resolved, tiny

ONE = {"data": 1}
ARRANGEMENTS = {
    "one": ONE,
    "two": {"data": 2},
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor": {"data": 1, "tensor": 8},
    "all": {"fsdp": 2, "tensor": 2},
}
FIELDS = {
    "model__num_layers": 2,
    "model__num_heads": 8,
    "model__embed_dim": 64,
    "model__dropout": 0.1,
    "data__batch_size": 16,
    "data__micro_batches": 2,
}


def arranged(name, **changes):
    return tiny(**FIELDS, **{f"parallel__{axis}": size for axis, size in ARRANGEMENTS[name].items()}, **changes)


def losses_of(name):
    """Losses over 50 steps; how many devices hold rows of a batch and the whole embedding; collectives' sizes."""
    cfg = config.resolve(config.override(arranged(name), {"model.vocab_size": 257}))
    steps = Steps(cfg)
    state, found = steps.init(0, step.split(cfg)[1], None), []
    lies = state.params["h"]["mlp"]["c_fc"]["kernel"].sharding
    for n in range(50):
        placed = parallel.put(batch(rows=16, seed=n), steps.mesh)
        before = state
        state, metrics = steps.advance(step.split(cfg)[1], state, placed, 1)
        assert all(x.is_deleted() for x in jax.tree.leaves(before.params))
        found.append(float(metrics["train/loss"]))
    assert state.params["h"]["mlp"]["c_fc"]["kernel"].sharding == lies
    rows = {(shard.index[0].start, shard.index[0].stop) for shard in placed["inputs"].addressable_shards}
    moments = state.opt_state[1].mu["h"]["mlp"]["c_fc"]["kernel"]
    return {
        "losses": found,
        "parts": len(rows),
        "kernel": list(lies.shard_shape(moments.shape)),
        "moments": list(moments.sharding.shard_shape(moments.shape)),
    }


def travels(folder):
    """Trains under each arrangement to step 4, restores that under all others, and goes on there to step 8."""
    out = {}
    for name in ARRANGEMENTS:
        jaxlm.train(arranged(name, steps=4), f"{folder}/{name}")
    for name in ARRANGEMENTS:
        with Checkpoints(Path(folder, name, "checkpoints"), writable=False) as saved:
            states = [saved.restore(Steps(prepare(arranged(other)).config).like, 4).state for other in ARRANGEMENTS]
        for state in states[1:]:
            assert_same_bits(state, states[0])
        other = list(ARRANGEMENTS)[list(ARRANGEMENTS).index(name) - 1]
        run = jaxlm.train(arranged(other, steps=8), f"{folder}/{name}")
        out[name] = [row["train/loss"] for row in rows(run.workdir) if "train/loss" in row]
    return out


def on_devices(count, call):
    """What a call of a function of this module gives, in a process with so many devices."""
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}", "JAX_PLATFORMS": "cpu"}
    code = f"import json; from tests.training import test_parallel as t; print(json.dumps(t.{call}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_arrangement_of_devices_gives_the_losses_of_one():
    found = {name: on_devices(8, f"losses_of({name!r})") for name in ARRANGEMENTS}
    for name, one in found.items():
        np.testing.assert_allclose(one["losses"], found["one"]["losses"], rtol=1e-4, err_msg=name)
    assert {name: one["parts"] for name, one in found.items()} == {
        "one": 1,
        "two": 2,
        "data": 8,
        "fsdp": 8,
        "tensor": 1,
        "all": 4,
    }
    whole = [2, 64, 256]
    assert {name: one["kernel"] for name, one in found.items()} == {
        "one": whole,
        "two": whole,
        "data": whole,
        "fsdp": [2, 8, 256],
        "tensor": [2, 64, 32],
        "all": [2, 32, 128],
    }
    assert all(one["moments"] == one["kernel"] for one in found.values())


@pytest.mark.slow
def test_a_run_moves_between_arrangements(tmp_path):
    found = on_devices(8, f"travels({str(tmp_path)!r})")
    for name, losses in found.items():
        np.testing.assert_allclose(losses, found["one"], rtol=1e-5, err_msg=name)


def test_repeated_steps_are_single_steps():
    structure, hparams = step.split(resolved(model__dropout=0.1))
    program = step.build(structure)
    single = many = jax.jit(program.init)(jax.random.key(0), hparams)
    batches = [batch(seed=n) for n in range(3)]
    losses = []
    for one in batches:
        single, metrics = jax.jit(program.train_step)(hparams, single, one)
        losses.append(metrics["train/loss"])
    stacked = {name: np.stack([one[name] for one in batches]) for name in batches[0]}
    many, metrics = jax.jit(parallel.repeat(program.train_step))(hparams, many, stacked)
    np.testing.assert_allclose(metrics["train/loss"], losses, rtol=1e-6)
    for path, x in leaves(single).items():
        np.testing.assert_allclose(leaves(many)[path], x, rtol=1e-5, atol=1e-7, err_msg=path)


def test_a_donated_state_is_taken_over():
    cfg = resolved()
    mesh = parallel.mesh(cfg.parallel, cfg.model, 4, 1)
    structure, hparams = step.split(cfg)
    program = step.build(structure)
    state = parallel.compile(program.init, mesh)(jax.random.key(0), hparams)
    parallel.compile(program.train_step, mesh, donate=(1,))(hparams, state, parallel.put(batch(), mesh))
    assert state.params["wte"]["embedding"].is_deleted()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel__data": 64}, "parallel.data=64, parallel.fsdp=1, parallel.tensor=1 are 64 devices; JAX sees"),
        ({"parallel__fsdp": 64}, "are 64 devices; JAX sees"),
        ({"data__batch_size": 3, "data__micro_batches": 3, "parallel__data": 1}, None),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(changes, message):
    cfg = resolved(**changes)
    if message is None:
        assert parallel.mesh(cfg.parallel, cfg.model, 3, 1).size == 1
        with pytest.raises(ConfigError, match="does not divide into 2 micro-batches"):
            parallel.mesh(cfg.parallel, cfg.model, 3, 2)
    else:
        with pytest.raises(ConfigError, match=message):
            parallel.mesh(cfg.parallel, cfg.model, cfg.data.batch_size, 1)


def refused():
    """What is said of axes that divide neither devices nor widths."""
    said = {}
    for name, changes in {
        "devices": {"fsdp": 3},
        "heads": {"tensor": 8},
        "width": {"fsdp": 8},
        "rows": {"data": 4, "fsdp": 2},
    }.items():
        section = resolved(**{f"parallel__{axis}": size for axis, size in changes.items()})
        model = (
            section.model if name != "width" else types.SimpleNamespace(**section.model.to_dict() | {"embed_dim": 12})
        )
        rows = 12 if name == "rows" else 48
        try:
            parallel.mesh(section.parallel, model, rows, 1)
        except ConfigError as error:
            said[name] = str(error)
    return said


def test_axes_that_divide_nothing_are_refused_by_name():
    said = on_devices(8, "refused()")
    assert "parallel.fsdp=3" in said["devices"] and "JAX sees 8" in said["devices"]
    assert said["heads"] == "parallel.tensor=8 does not divide model.num_heads=2"
    assert "parallel.fsdp=8 does not divide model.embed_dim=12" in said["width"]
    assert "data.batch_size=12 does not divide into 1 micro-batches over 8 devices" in said["rows"]


def told():
    section = {"parallel__data": 1, "parallel__fsdp": 4, "parallel__tensor": 2}
    return explain(tiny(**FIELDS | {"model__dropout": 0.0}, **section)).splitlines()


def test_explain_tells_how_parameters_are_divided():
    lines = on_devices(8, "told()")
    (kernel,) = [line.split() for line in lines if line.strip().startswith("h/mlp/c_fc/kernel")]
    assert kernel[-3:] == ["-,", "fsdp,", "tensor"]
    (norm,) = [line for line in lines if line.strip().startswith("ln_f/scale")]
    assert norm.rstrip().endswith(" B")
    (devices,) = [line for line in lines if line.strip().startswith("devices ")]
    size, mb = re.search(r"data 1, fsdp 4, tensor 2: ([\d.]+) (MB)", devices).groups()
    whole = 3 * 125_696 * 4 / 1e6  # parameters, and Adam's two moments
    assert mb == "MB" and whole / 8 - 0.1 < float(size) < whole / 8 + 0.1
