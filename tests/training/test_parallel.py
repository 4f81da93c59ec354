import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import config
from jaxlm.training import devices, memory, parallel, step, steps
from jaxlm.training.checkpoint import Checkpoints
from jaxlm.training.explain import explain
from jaxlm.training.prepare import prepare
from tests.runs import ROOT, rows
from tests.tiny import assert_same_bits, batch, leaves, resolved, tiny

ARRANGEMENTS = {
    "one": {"data": 1},
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor": {"data": 1, "tensor": 8},
    "all": {"fsdp": 2, "tensor": 2},
    "pmap": {"mode": "pmap"},
}
FIELDS = {
    "model__num_layers": 2,
    "model__num_heads": 8,
    "model__embed_dim": 64,
    "data__batch_size": 16,
    "data__micro_batches": 2,
}


def arranged(name, **changes):
    return tiny(**FIELDS | {f"parallel__{axis}": size for axis, size in ARRANGEMENTS[name].items()} | changes)


def built(name, **changes):
    cfg = config.resolve(config.override(arranged(name, **changes), {"model.vocab_size": 257}))
    return cfg, steps.build(cfg)


def losses_of(name, **changes):
    """Losses over 50 steps; how many devices hold rows of a batch; the shapes of a device's part of a kernel and of its
    moments; a hash of the batches."""
    cfg, compiled = built(name, **changes)
    hparams = step.split(cfg)[1]
    state, found, seen = compiled.together([compiled.init(0, hparams, None)]), [], hashlib.sha256()
    lies = jax.tree.map(lambda x: x.sharding, state)
    for n in range(50):
        placed = compiled.batch([batch(rows=16, seed=n)])
        seen.update(np.asarray(placed["inputs"]).tobytes())
        before = state
        state, metrics = compiled.advance(hparams, state, placed, 1)
        assert all(x.is_deleted() for x in jax.tree.leaves(before.params))
        found.append(float(compiled.part(compiled.fetch(metrics), 0)["train/loss"]))
    assert all(jax.tree.leaves(jax.tree.map(lambda x, where: x.sharding.is_equivalent_to(where, x.ndim), state, lies)))
    held = {(x.index[0].start, x.index[0].stop) for x in jnp.asarray(placed["inputs"]).addressable_shards}

    def part(x):
        return list(x.sharding.shard_shape(x.shape))

    return {
        "losses": found,
        "parts": len(held),
        "kernel": part(state.params["h"]["mlp"]["c_fc"]["kernel"]),
        "moments": part(state.opt_state[1].mu["h"]["mlp"]["c_fc"]["kernel"]),
        "batches": seen.hexdigest(),
    }


def losses():
    """With dropout, but for pmap, whose masks are others."""
    found = {name: losses_of(name, model__dropout=0.1) for name in ARRANGEMENTS if name != "pmap"}
    return found | {"pmap": losses_of("pmap"), "one without": losses_of("one")}


def travels(folder):
    """Trains under some arrangements to step 2, restores that under all, and goes on under another to step 4."""
    out, names = {}, ["one", "all", "pmap"]
    fields = {"eval__every": 0, "log__every": 1}
    fields["optimizer__scale_by_learning_rate"] = {"peak": 1e-3, "schedule": "constant"}  # one program for any steps
    likes = {name: steps.build(prepare(arranged(name)).config).like for name in ARRANGEMENTS}
    for name, other in zip(names, names[1:] + names[:1]):
        workdir = Path(folder, name)
        jaxlm.train(arranged(name, steps=2, **fields), workdir)
        with Checkpoints(workdir / "checkpoints", writable=False) as saved:
            states = {other: saved.restore(like, 2).state for other, like in likes.items()}
        for state in states.values():
            assert_same_bits(state, states["one"])
        jaxlm.train(arranged(other, steps=4, **fields), workdir)
        out[name] = [row["train/loss"] for row in rows(workdir) if "train/loss" in row]
    return out


def on_devices(count, call):
    """What a call of a function of this module gives, in a process with so many devices."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(count), "JAX_PLATFORMS": "cpu"}
    code = f"import json; from tests.training import test_parallel as t; print(json.dumps(t.{call}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_arrangement_of_devices_gives_the_losses_of_one():
    found = on_devices(8, "losses()")
    without = found.pop("one without")
    for name, one in found.items():
        like = without if name == "pmap" else found["one"]
        np.testing.assert_allclose(one["losses"], like["losses"], rtol=1e-4, err_msg=name)
    assert abs(without["losses"][0] - found["one"]["losses"][0]) > 1e-3
    parts = {name: one["parts"] for name, one in found.items()}
    assert parts == {"one": 1, "data": 8, "fsdp": 8, "tensor": 1, "all": 4, "pmap": 8}
    whole = [2, 64, 256]
    assert {name: one["kernel"] for name, one in found.items()} == {
        "one": whole,
        "data": whole,
        "fsdp": [2, 8, 256],
        "tensor": [2, 64, 32],
        "all": [2, 32, 128],
        "pmap": [1, *whole],
    }
    assert all(one["moments"] == one["kernel"] for one in found.values())
    assert len({one["batches"] for one in found.values()}) == 1


@pytest.mark.slow
def test_a_run_moves_between_arrangements(tmp_path):
    found = on_devices(8, f"travels({str(tmp_path)!r})")
    for name, losses in found.items():
        assert len(losses) == 4
        np.testing.assert_allclose(losses, found["one"], rtol=1e-5, err_msg=name)


def text(name):
    """What the compiler makes of a step, of a vocabulary and layers whose sizes are no one else's."""
    sizes = {"model__num_layers": 3, "data__micro_batches": 1, "model__context_length": 24, "model__unroll": False}
    compiled = built(name, **sizes)[1].lower().compile()
    donated = compiled.memory_analysis().alias_size_in_bytes / compiled.memory_analysis().argument_size_in_bytes
    return {"text": compiled.as_text(), "donated": donated}


def texts():
    return {name: text(name) for name in ("fsdp", "tensor", "all")}


def moved(text, kind):
    """{shape: how often} of what collectives of a kind give, where it is at least as large as the smallest kernel."""
    given = " ".join(re.findall(rf"= (.*?) {kind}(?:-start)?\(", text))
    shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", given)]
    return Counter(shape for shape in shapes if math.prod(shape) >= 64 * 64)


@pytest.mark.slow
def test_devices_exchange_what_they_must():
    """Under fsdp a layer's parameters at a time and no activations but the gradient of the embedding's rows; under
    tensor of the latter what two products a layer add up, and no logits."""
    found = on_devices(8, "texts()")
    for name, one in found.items():
        assert one["donated"] > 0.98, name
        assert not re.search(r" (infeed|outfeed|send|recv)\(", one["text"]), name
    B, T, D, F, V = 16, 24, 64, 256, 384
    fsdp, tensor, both = (found[name]["text"] for name in ("fsdp", "tensor", "all"))
    # each of a layer's kernels once forwards and once backwards; the embedding for its rows and for the logits
    # (those of queries, keys and values apart: a GPU's compiler sends them together)
    assert moved(fsdp, "all-gather") == {(D, D): 4 * 2, (D, F): 2, (F, D): 2, (V, D): 2}
    assert not moved(fsdp, "collective-permute")
    assert set(moved(fsdp, "all-reduce")) == {(D, D), (D, F), (F, D), (D, V)}  # their gradients

    assert moved(tensor, "all-reduce") == {(B, T, D): 2 + 2 + 1 + 1}  # a layer's forwards, backwards; embedding, head
    assert not moved(tensor, "all-gather") and not moved(tensor, "collective-permute")

    halves = {(D // 2, 3 * D): 2, (D // 2, D): 2, (D, F // 2): 2, (F // 2, D): 2, (V // 2, D): 2}
    assert moved(both, "all-gather") == {shape: times for shape, times in halves.items() if math.prod(shape) >= D * D}
    assert moved(both, "all-reduce")[B // 4, T, D] == 6


def test_repeated_steps_are_single_steps():
    structure, hparams = step.split(resolved(model__dropout=0.1))
    program = step.build(structure)
    single = many = jax.jit(program.init)(jax.random.key(0), hparams)
    train_step = jax.jit(program.train_step)
    batches = [batch(seed=n) for n in range(3)]
    losses = []
    for one in batches:
        single, metrics = train_step(hparams, single, one)
        losses.append(metrics["train/loss"])
    stacked = {name: np.stack([one[name] for one in batches]) for name in batches[0]}
    many, metrics = jax.jit(parallel.repeat(program.train_step))(hparams, many, stacked)
    np.testing.assert_allclose(metrics["train/loss"], losses, rtol=1e-6)
    for path, x in leaves(single).items():
        np.testing.assert_allclose(leaves(many)[path], x, rtol=1e-5, atol=1e-6, err_msg=path)


def test_a_donated_state_is_taken_over():
    cfg = resolved()
    mesh = devices.mesh(cfg)
    structure, hparams = step.split(cfg)
    program = step.build(structure)
    state = parallel.compile(program.init, mesh)(jax.random.key(0), hparams)
    parallel.compile(program.train_step, mesh, donate=(1,))(hparams, state, parallel.put(batch(), mesh))
    assert state.params["wte"]["embedding"].is_deleted()


@pytest.mark.parametrize("deterministic", [False, True])
def test_determinism_is_told_to_the_compiler_of_gpus_alone(monkeypatch, deterministic):
    monkeypatch.setattr(parallel.jax, "jit", lambda fn, compiler_options, **_: compiler_options)

    def options(platform):
        mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
        return parallel.compile(len, mesh, out=(), deterministic=deterministic)

    assert options("gpu")["xla_gpu_deterministic_ops"] == deterministic
    assert options("cpu") is None


@pytest.mark.parametrize("lanes", [0, 2])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_config_says_whether_its_steps_are_deterministic(monkeypatch, deterministic, lanes):
    told, compile = [], parallel.compile

    def spy(*args, **kwargs):
        told.append(kwargs["deterministic"])
        return compile(*args, **kwargs)

    monkeypatch.setattr(parallel, "compile", spy)
    steps.build(resolved(parallel__deterministic=deterministic), lanes)
    assert set(told) == {deterministic}


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_deterministic_gpu_gives_the_same_bits(dropout):
    def trained():
        wide = {"model__embed_dim": 128, "model__num_heads": 2, "model__context_length": 256, "data__batch_size": 32}
        cfg = resolved(model__dtype="bfloat16", model__dropout=dropout, parallel__deterministic=True, **wide)
        compiled = steps.build(cfg)
        hparams = compiled.stacked([step.split(cfg)[1]])
        state = compiled.together([compiled.init(0, step.split(cfg)[1], None)])
        for n in range(20):  # few ids, so that many rows of the embedding's gradient are added up
            here = compiled.batch([batch(rows=32, length=256, vocabulary=16, seed=n)])
            state, _ = compiled.advance(hparams, state, here, 1)
        return state

    assert_same_bits(trained(), trained())


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


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode is 'vmap'; expected 'jit', 'lanes' or 'pmap'"):
        parallel.compile(lambda x: x, memory.ONE, "vmap")
