"""Training on pairs and packed documents: no example sees another, packing changes no loss, and runs go on as ever."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import data, evaluate
from jaxlm.model import gpt2, losses
from tests.runs import rows
from tests.tiny import assert_same_bits, resolved, tiny
from tests.training.test_loop import signalled

PAIRS = [(f"what is {i}?" * (1 + i % 2), f" {i * i}") for i in range(24)]
FIELDS = {"data__format": "pairs", "model__context_length": 48, "data__validation": "25%"}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in PAIRS))
    return str(path)


@pytest.fixture
def model():
    built = gpt2.build(resolved(model__context_length=48).model)
    return built, built.init(jax.random.key(0))


def by_pair(model, params, batches):
    """{(tokens of the completion): nll of a pair}."""
    found = {}
    for batch in batches:
        logits = jax.nn.log_softmax(model.apply(params, batch))
        nll = -jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0] * batch["weights"]
        for b, row in enumerate(batch.get("segment_ids", np.ones_like(batch["inputs"]))):
            for number in set(row.tolist()) - {0}:
                here = (row == number) & (batch["weights"][b] > 0)
                if here.any():
                    found[tuple(batch["targets"][b, here].tolist())] = float(nll[b, here].sum())
    return found


def test_packed_and_padded_pairs_have_the_same_loss(source, model):
    section = tiny(data__source=source, **FIELDS).data
    opened = data.open(section)
    alone = data.held_out(section, opened.tokenizer, opened.train, 48, 4)
    section.pack = True
    packed = data.held_out(section, opened.tokenizer, opened.train, 48, 4)
    assert len(packed.batches) < len(alone.batches) and packed.bytes_per_token == alone.bytes_per_token
    one, other = by_pair(*model, alone.batches), by_pair(*model, packed.batches)
    assert one.keys() == other.keys() and len(one) == opened.train.num_documents
    for key, value in one.items():
        assert other[key] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("leak", [None, "segment_ids", "positions"])
def test_an_example_sees_no_other(source, model, leak):
    """Other tokens in the first example of a row move the losses of the others only if attention or positions leak."""
    section = tiny(data__source=source, data__pack=True, **FIELDS).data
    opened = data.open(section)
    batch = data.held_out(section, opened.tokenizer, opened.train, 48, 2).batches[0]
    built, params = model
    first, others = batch["segment_ids"] == 1, batch["segment_ids"] > 1
    assert first.any() and others.any()
    changed = dict(batch) | {"inputs": np.where(first, 7, batch["inputs"])}
    whole = {name: x for name, x in batch.items() if name != leak}
    changed = {name: x for name, x in changed.items() if name != leak}
    before, after = built.apply(params, whole), built.apply(params, changed)
    if leak == "segment_ids":
        assert np.abs(before - after)[others].max() > 1e-3
        return
    np.testing.assert_array_equal(before[others], after[others])
    if leak == "positions":  # of the row, not of the example: then an example's place in its row moves its loss
        assert np.abs(before - built.apply(params, batch))[others].max() > 1e-3


@pytest.mark.parametrize("pack", [False, True])
def test_a_run_learns_its_pairs(source, tmp_path, pack, capfd):
    rate = {"optimizer__scale_by_learning_rate__peak": 0.01}
    run = jaxlm.train(
        tiny(steps=30, eval__every=30, data__source=source, data__pack=pack, **rate, **FIELDS), tmp_path / "run"
    )
    said = capfd.readouterr().err
    assert " pairs in " in said and " of whose positions are used" in said
    assert run.metrics["eval/loss"] < 4.0  # of 5.5 at the start


def test_a_run_on_packed_pairs_that_is_stopped_ends_with_the_same_bits(source, tmp_path, monkeypatch):
    cfg = tiny(data__source=source, data__pack=True, model__dropout=0.1, **FIELDS)
    whole = jaxlm.train(cfg, tmp_path / "whole")
    with monkeypatch.context() as patched:
        signalled(patched, signal.SIGTERM, 3)
        assert jaxlm.train(cfg, tmp_path / "run").status == "preempted"
    assert_same_bits(jaxlm.train(cfg, tmp_path / "run").state, whole.state)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_micro_batches_change_no_number(source):
    cfg = tiny(data__source=source, data__pack=True, **FIELDS)
    opened = data.open(cfg.data)
    batch = data.training(cfg.data, opened, 48, 0)[0][0]
    built = gpt2.build(resolved(model__context_length=48).model)
    params = built.init(jax.random.key(0))

    def sums(rows):
        part = {name: x[rows] for name, x in batch.items()}
        return losses.token_sums(built.apply(params, part), part["targets"], part["weights"])

    np.testing.assert_allclose(np.add(sums([0, 1]), sums([2, 3])), sums([0, 1, 2, 3]), rtol=1e-5)


def test_evaluating_a_run_on_pairs(source, tmp_path, capsys):
    cfg = tiny(data__source=source, eval__batches=0, **FIELDS)
    run = jaxlm.train(cfg, tmp_path / "run")
    assert evaluate.main([f"--checkpoint={tmp_path / 'run'}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["eval/loss"] == pytest.approx(run.metrics["eval/loss"], rel=1e-5)
    opened = data.open(cfg.data)
    held = data.held_out(cfg.data, opened.tokenizer, opened.validation, 48, 4)
    assert found["tokens"] == sum(batch["weights"].sum() for batch in held.batches) and "words" not in found
    assert evaluate.main([f"--checkpoint={tmp_path / 'run'}", "--stride=8"]) == 2
    assert "stride is 8, but pairs and packed documents have rows of their own" in capsys.readouterr().err
