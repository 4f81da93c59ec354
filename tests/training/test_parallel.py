import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.errors import ConfigError
from jaxlm.training import parallel, step
from tests.tiny import batch, leaves, resolved

SCRIPT = """
import json, sys
import jax, numpy as np
from jaxlm.training import parallel, step
from tests.tiny import batch, resolved
cfg = resolved(data__micro_batches=2)
mesh = parallel.mesh(cfg.parallel, cfg.data.batch_size, cfg.data.micro_batches)
structure, hparams = step.split(cfg)
program = step.build(structure)
state = parallel.compile(program.init, mesh)(jax.random.key(0), hparams)
train_step = parallel.compile(program.train_step, mesh, donate=(1,))
losses, shards = [], 0
for n in range(5):
    placed = parallel.put(batch(seed=n), mesh)
    shards = len({shard.device for shard in placed["inputs"].addressable_shards})
    state, metrics = train_step(hparams, state, placed)
    losses.append(float(metrics["train/loss"]))
replicated = state.params["wte"]["embedding"].is_fully_replicated
print(json.dumps({"losses": losses, "shards": shards, "replicated": replicated}))
"""


def on_devices(count):
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}", "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_two_devices_give_the_losses_of_one():
    one, two = on_devices(1), on_devices(2)
    assert (one["shards"], two["shards"]) == (1, 2)
    assert two["replicated"]
    np.testing.assert_allclose(one["losses"], two["losses"], rtol=1e-5)


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
    mesh = parallel.mesh(cfg.parallel, 4, 1)
    structure, hparams = step.split(cfg)
    program = step.build(structure)
    state = parallel.compile(program.init, mesh)(jax.random.key(0), hparams)
    parallel.compile(program.train_step, mesh, donate=(1,))(hparams, state, parallel.put(batch(), mesh))
    assert state.params["wte"]["embedding"].is_deleted()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"parallel__data": 64}, "parallel.data=64, but JAX sees"), ({"data__batch_size": 3}, None)],
)
def test_a_mesh_that_does_not_fit_is_refused(changes, message):
    cfg = resolved(**changes)
    if message is None:
        assert parallel.mesh(cfg.parallel, 3, 1).size == 1
        with pytest.raises(ConfigError, match="does not divide into 2 micro-batches"):
            parallel.mesh(cfg.parallel, 3, 2)
    else:
        with pytest.raises(ConfigError, match=message):
            parallel.mesh(cfg.parallel, cfg.data.batch_size, 1)
