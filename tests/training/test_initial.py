"""A run that begins from another model: its numbers, what follows it, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import config, config_json, main
from jaxlm.data import write_tokens
from jaxlm.data.tokenizers import Bytes, Chars
from jaxlm.errors import ConfigError, DataError
from jaxlm.evals import perplexity
from jaxlm.training import initial, manifest, rundir, step
from jaxlm.training.explain import explain
from jaxlm.training.export import export
from jaxlm.training.prepare import prepare
from tests.test_hub import cached
from tests.tiny import CORPUS, assert_same_bits, leaves, tiny
from tests.training.test_loop import ROOT, rows, signalled

STILL = {"optimizer__scale_by_learning_rate__peak": 0.0}


def usual(init_from, **changes):
    """A short run with the default architecture, but for `init_from` and `changes`."""
    shape = dict(num_layers=4, num_heads=4, embed_dim=128, context_length=0)
    assert all(config.default().model[name] == value for name, value in shape.items() if value)
    fields = {f"model__{name}": value for name, value in shape.items()} | {"steps": 4, "init_from": str(init_from)}
    return tiny(**(fields | changes))


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """`trained` as a Hugging Face directory."""
    return export(trained, tmp_path_factory.mktemp("exported") / "model")


def log(workdir):
    return (workdir / "log.txt").read_text()


# The parameters


def test_a_run_begins_with_the_loss_of_the_model_that_it_begins_from(trained, folder, tmp_path):
    from jaxlm import data

    model, params, _, cfg = jaxlm.load(trained)
    split = data.open(cfg.data).validation
    batches = data.evaluation(split.tokens, 4, 16, 2)
    eval_step = jax.jit(lambda batch: perplexity.token_sums(model, params, batch))
    expected = perplexity.metrics(
        perplexity.sums(eval_step, batches), bytes_per_token=split.num_bytes / (split.num_tokens - 1)
    )
    for source in (trained, folder):
        result = jaxlm.train(usual(source, **STILL), tmp_path / source.name)
        assert result.metrics["eval/loss"] == pytest.approx(expected["eval/loss"], rel=1e-6)
        assert_same_bits(result.state.params, params)
        assert int(result.state.step) == 4
    assert "initial parameters from" in log(tmp_path / "run") and ", step 40; with them" in log(tmp_path / "run")
    saved = config_json.from_json((tmp_path / "model" / "config.json").read_text())
    assert saved.model.to_dict() == cfg.model.to_dict() | {"feed_forward_dim": 64}
    assert saved.data.tokenizer == str(folder) and saved.init_from == str(folder)
    assert_same_bits(jaxlm.load(tmp_path / "model").params, params)


def test_it_learns_from_there_with_a_fresh_optimizer(trained, tmp_path):
    older = trained / "checkpoints" / "20"
    result = jaxlm.train(usual(older, steps=8), tmp_path / "run")
    scratch = [row["train/loss"] for row in rows(trained) if "train/loss" in row]
    losses = [row["train/loss"] for row in rows(tmp_path / "run") if "train/loss" in row]
    assert losses[0] < min(scratch[:5])
    assert np.any(leaves(result.state.params)["wte/embedding"] != leaves(jaxlm.load(older).params)["wte/embedding"])
    first = result.state.opt_state
    counts = [leaf for path, leaf in leaves(first).items() if path.endswith("count")]
    assert counts and all(count == 8 for count in counts)


def test_a_run_that_was_stopped_ends_with_the_same_bits_and_needs_its_source_no_more(folder, tmp_path, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / "copy")
    cfg = usual(copy, steps=8, eval__every=2, checkpoint__every=2, model__dropout=0.1)
    undisturbed = jaxlm.train(cfg, tmp_path / "undisturbed")
    with monkeypatch.context() as patched:
        signalled(patched, signal.SIGTERM, 5)
        assert jaxlm.train(cfg, tmp_path / "run").exit_code == 75
    shutil.rmtree(copy)  # nothing of it is needed any more
    assert "model.embed_dim = 16" in explain(cfg, tmp_path / "run")
    hashed, verify = [], manifest.verify
    monkeypatch.setattr(manifest, "verify", lambda folder, item="": hashed.append(folder.name) or verify(folder, item))
    again = jaxlm.train(cfg, tmp_path / "run")
    assert hashed == ["5"]  # once
    assert_same_bits(again.state, undisturbed.state)
    assert rows(tmp_path / "run") == rows(tmp_path / "undisturbed")
    assert log(tmp_path / "run").count("initial parameters from") == 1


def test_a_folder_is_not_taken_for_a_hub_id_once_it_is_elsewhere(trained, tmp_path, monkeypatch):
    """As in an export, whose card would name a stranger's model as the base."""
    monkeypatch.chdir(trained.parent.parent)
    spec = f"{trained.parent.name}/run"
    cfg = usual(spec)
    jaxlm.train(cfg, tmp_path / "run")
    assert f"initial parameters from './{spec}', step 40; with them model." in log(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    again = prepare(cfg, tmp_path / "run").config  # as it goes on, called in the same words
    assert again == rundir.read_config(tmp_path / "run") and again.init_from == f"./{spec}"
    card = (export(tmp_path / "run", tmp_path / "out") / "README.md").read_text()
    assert "base_model" not in card and f"| started from | `./{spec}` |" in card


@pytest.mark.slow
def test_another_size_and_type_are_requests_that_are_said(trained, tmp_path):
    sizes = dict(model__context_length=12, model__vocab_size=300, model__param_dtype="bfloat16")
    before = leaves(jaxlm.load(trained).params)
    after = leaves(jaxlm.train(usual(trained, eval__every=0, **STILL, **sizes), tmp_path / "run").state.params)
    assert {str(leaf.dtype) for leaf in after.values()} == {"bfloat16"}
    for path, known in (("wpe/embedding", 12), ("wte/embedding", 257), ("ln_f/scale", 16)):
        np.testing.assert_array_equal(after[path][:known], before[path][:known].astype(after[path].dtype))
    assert "positions cut from 16 to 12" in log(tmp_path / "run")
    assert "token ids grown from 257 to 300" in log(tmp_path / "run")


def test_two_devices_begin_alike(trained, tmp_path):
    """In a process that sees two: parameters are read onto one."""
    text = config_json.to_json(config.resolve(usual(trained, eval__every=0, **STILL)))
    script = (
        "import sys, jaxlm; from jaxlm import config_json\n"
        "sys.exit(jaxlm.train(config_json.from_json(sys.argv[1]), sys.argv[2]).exit_code)"
    )
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, "-c", script, text, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "2 x cpu" in done.stderr, done.stderr
    assert_same_bits(jaxlm.load(tmp_path / "run").params, jaxlm.load(trained).params)


# What follows the source


def test_explain_shows_what_follows_and_reads_no_weights(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    text = explain(usual(copy, model__vocab_size=300))
    assert (
        "model.embed_dim = 16" in text
        and "model.vocab_size = 300" in text
        and "wte/embedding         [384, 16]" in text
    )
    assert f"initial parameters from '{copy}'; with them" in text and "model.num_layers 1" in text


def test_a_config_that_followed_follows_again(folder):
    once, _, _ = prepare(usual(folder))
    again, _, source = prepare(config_json.from_json(config_json.to_json(once)))
    assert again == once and source.said == [f"initial parameters from '{folder}'"]


def test_the_dropout_of_the_source_is_said_where_the_run_has_another(trained, folder):
    for source, rates in ((folder, "embd_pdrop 0.0, attn_pdrop 0.0, resid_pdrop 0.0"), (trained, "dropout 0.0")):
        assert len(initial.follow(config.resolve(usual(source)))[1].said) == 1
        said = initial.follow(config.resolve(usual(source, model__dropout=0.1)))[1].said
        assert said[1] == f"model.dropout is 0.1, and {str(source)!r} was trained with {rates}"


def test_an_architecture_that_is_asked_for_must_be_the_sources(trained):
    assert prepare(usual(trained, model__num_heads=2, model__feed_forward_dim=64))[0].model.num_heads == 2
    for changes, message in [
        ({"model__embed_dim": 32}, r"model.embed_dim is 32, but that of init_from='.*run' is 16; leave it out"),
        ({"model__num_heads": 3}, "model.num_heads is 3, .* is 2; leave it out"),
        ({"model__tie_embeddings": False}, "model.tie_embeddings is False, .* is True"),
        ({"model__feed_forward_dim": 512}, "model.feed_forward_dim is 512, .* is 64"),
    ]:
        with pytest.raises(ConfigError, match=message):
            prepare(usual(trained, **changes))


def said(cfg):
    """The lines that a fresh run says of its first parameters."""
    cfg, opened, source = prepare(cfg)
    return initial.begin(cfg, source, opened.tokenizer, opened.train.sha256, step.shapes(cfg))[1]


WARNING = "warning: the tokenizer of the data is not that of"


def test_the_tokenizer_follows_where_none_is_asked_for(trained, folder, tmp_path):
    assert prepare(usual(trained))[0].data.tokenizer == "bytes"  # the run's too
    cfg, opened, _ = prepare(usual(folder))
    assert cfg.data.tokenizer == str(folder)
    np.testing.assert_array_equal(opened.tokenizer.encode("aé"), Bytes().encode("aé"))
    letters = shutil.copytree(trained, tmp_path / "letters")
    (letters / "tokenizer.json").write_text(Chars("".join(sorted(set(CORPUS.read_text())))).to_json())
    for spec in (letters, letters / "checkpoints" / "20"):
        cfg, opened, source = prepare(usual(spec))
        assert cfg.data.tokenizer == str(letters) and opened.tokenizer == source.tokenizer
    assert not any(line.startswith(WARNING) for line in said(usual(letters)))


def test_another_tokenizer_than_the_sources_is_warned_of_and_must_fit(folder):
    assert said(usual(folder, data__tokenizer="bpe:300", model__vocab_size=300))[1].startswith(WARNING)
    with pytest.raises(ConfigError, match=r"model.vocab_size=257 of '.*model', but the tokenizer .* set model.vocab"):
        prepare(usual(folder, data__tokenizer="bpe:300"))
    with pytest.raises(ConfigError, match=r"model.vocab_size=290, but the tokenizer 'bpe:300' has 300"):
        prepare(usual(folder, data__tokenizer="bpe:300", model__vocab_size=290))


def test_a_token_file_brings_its_own_tokenizer(folder, tmp_path):
    same = write_tokens(tmp_path / "same.bin", [Bytes().encode(CORPUS.read_text())], Bytes()).path
    assert prepare(usual(folder, data__source=str(same)))[0].data.tokenizer == "bytes"
    assert (
        len(said(usual(folder, data__source=str(same)))) == 1
    )  # the same ids, though the folder spells them otherwise
    letters = Chars("".join(map(chr, range(97, 123))))
    other = write_tokens(tmp_path / "other.bin", [letters.encode("abcxyz" * 500)], letters).path
    assert said(usual(folder, data__source=str(other)))[1].startswith(WARNING)


def test_a_source_without_a_tokenizer_needs_one_from_the_config(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(DataError, match="has no tokenizer"):
        prepare(usual(copy))
    assert "has no tokenizer that could be compared" in said(usual(copy, data__tokenizer=str(folder)))[1]


# From the command line


FLAGS = [
    *("--config.data.batch_size=4", "--config.steps=2", "--config.eval.every=0", "--config.model.dtype=float32"),
    *("--config.log.progress=False", "--config.log.writers=jsonl,", f"--config.data.source={CORPUS}"),
]


def call(*flags, workdir):
    return main.main(["--config=configs/finetune_gpt2.py", f"--workdir={workdir}", *FLAGS, *flags])


def test_a_hub_id_in_the_cache_trains_without_a_network(folder, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    shutil.copytree(folder, cached(tmp_path / "hub", "owner/tiny"), dirs_exist_ok=True)
    assert call("--config.init_from=owner/tiny", workdir=tmp_path / "run") == 0
    assert "initial parameters from 'owner/tiny'; with them data.tokenizer 'owner/tiny'" in log(tmp_path / "run")
    assert config_json.from_json((tmp_path / "run" / "config.json").read_text()).data.tokenizer == "owner/tiny"


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--config.init_from=owner/nothing"], 4, "'owner/nothing' is not in the local Hugging Face cache"),
        (["--config.init_from=./nothing"], 4, "no checkpoint at './nothing'"),
        (["--config.init_from=FOLDER", "--config.model.embed_dim=32"], 2, "model.embed_dim is 32"),
        (["--config.init_from=FOLDER", "--config.model.vocab_size=100"], 2, "set model.vocab_size=257"),
        (["--config.init_from=FOLDER", "--config.data.tokenizer=bpe:300"], 2, "set model.vocab_size=300"),
        (["--config.init_from=", "--config.model.context_length=0"], 2, "model.context_length is 0"),
    ],
)
def test_a_bad_request_is_an_error_that_leaves_no_run(folder, tmp_path, capsys, flags, code, message):
    flags = [flag.replace("FOLDER", str(folder)) for flag in flags]
    assert call(*flags, workdir=tmp_path / "run") == code
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["truncated", "other shapes", "no JSON"])
def test_damaged_weights_are_an_error_that_leaves_no_run(folder, tmp_path, capsys, damage):
    copy = shutil.copytree(folder, tmp_path / "copy")
    if damage == "truncated":
        weights = copy / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "other shapes":
        raw = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(raw | {"n_positions": 32}))
    else:
        (copy / "config.json").write_text("{")
    assert call(f"--config.init_from={copy}", workdir=tmp_path / "run") == 4
    assert str(copy) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# A branch of a run: its whole state


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """A run of 12 steps with dropout, and a checkpoint at each fourth."""
    where = tmp_path_factory.mktemp("trunk") / "run"
    return jaxlm.train(branched(where, init_from="", init_state=False), where)


def branched(source, **changes):
    fields = dict(init_from=f"{source}/checkpoints/8", init_state=True, steps=12, model__dropout=0.1)
    fields |= dict(eval__every=4, checkpoint__every=4, checkpoint__keep=9, log__every=1)
    return tiny(**(fields | changes))


def numbers(workdir, first):
    """The rows from a step on, but for what a clock says."""
    clocks = ("time", "throughput/", "energy/", "eval/gap")
    kept = [row for row in rows(workdir) if row["step"] >= first]
    return [{name: value for name, value in row.items() if not name.startswith(clocks)} for row in kept]


def test_a_branch_that_changes_nothing_ends_with_the_bits_of_its_run(trunk, tmp_path):
    result = jaxlm.train(branched(trunk.workdir), tmp_path / "run")
    assert_same_bits(result.state, trunk.state)
    assert numbers(tmp_path / "run", 0) == numbers(trunk.workdir, 9)
    assert "at step 8, which goes on with sequence 32 of its data" in log(tmp_path / "run")
    assert min(int(path.name) for path in (tmp_path / "run/checkpoints").iterdir()) > 8


def test_a_branch_has_rates_and_schedules_of_its_own(trunk, tmp_path):
    rate = {f"optimizer__scale_by_learning_rate__{name}": value for name, value in (("peak", 0.01), ("final", 0.0))}
    jaxlm.train(branched(trunk.workdir, steps=10, **rate), tmp_path / "run")
    first, second = (row for row in numbers(tmp_path / "run", 9) if "train/loss" in row)
    then = next(row for row in numbers(trunk.workdir, 9) if "train/loss" in row)
    assert first["train/loss"] == then["train/loss"]  # before its first update
    assert first["optim/learning_rate"] > second["optim/learning_rate"] > 0 and first != then
    assert first["data/tokens"] == then["data/tokens"]


def test_a_branch_on_other_data_begins_with_its_first_sequence(trunk, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text((CORPUS.read_text() if hasattr(CORPUS, "read_text") else "abc ") * 40)
    result = jaxlm.train(branched(trunk.workdir, data__source=str(other)), tmp_path / "run")
    assert int(result.state.step) == 12
    assert "which begins with the first sequence of its own data" in log(tmp_path / "run")


def test_a_branch_of_another_seed_says_so(trunk, tmp_path):
    result = jaxlm.train(branched(trunk.workdir, seed=5), tmp_path / "run")
    assert "goes on with sequence 32 of its data, in the order of seed 5" in log(tmp_path / "run")
    assert np.any(leaves(result.state.params)["wte/embedding"] != leaves(trunk.state.params)["wte/embedding"])


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"steps": 8}, ConfigError, "has 8 steps, and steps=8 counts these too"),
        ({"init_from": "folder"}, ConfigError, "needs the state of a run, and init_from="),
        (
            {"optimizer__chain": ("scale_by_learning_rate",)},
            DataError,
            "a schedule where the source has one.* With init_state=F",
        ),
        ({"init_from": ""}, ConfigError, "init_state=True begins with the state of another run: name it, as init_from"),
    ],
)
def test_a_branch_that_can_not_be(trunk, folder, tmp_path, changes, error, said):
    changes = {name: str(folder) if value == "folder" else value for name, value in changes.items()}
    with pytest.raises(error, match=said):
        jaxlm.train(branched(trunk.workdir, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
