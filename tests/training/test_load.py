"""Models from where they lie: what is found, what it computes, and what is said where nothing is."""

import json
import os
import shutil

import jax
import numpy as np
import optax
import optax.contrib
import pytest

import jaxlm
from jaxlm import config
from jaxlm.data import tokenizer_export
from jaxlm.data.tokenizers import Bytes, Chars
from jaxlm.errors import ConfigError, DataError
from jaxlm.optim.wrappers import evaluation_params
from jaxlm.training import manifest, rundir
from jaxlm.training.checkpoint import Checkpoints
from jaxlm.training.export import export
from jaxlm.training.load import Located, locate, read_params
from jaxlm.training.step_folders import StepFolders
from tests.test_hub import cached
from tests.tiny import assert_same_bits, tiny

TOKENS = np.array([[104, 101, 108, 108, 111, 32, 119]], np.int32)


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """`trained` as a Hugging Face directory."""
    return export(trained, tmp_path_factory.mktemp("exported") / "model")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


def logits(loaded):
    return np.asarray(jax.jit(loaded.model.apply)(loaded.params, {"inputs": TOKENS}))


def test_a_run_directory_is_its_latest_step(trained):
    assert locate(trained) == Located(trained, 40)
    model, params, tokenizer, cfg = jaxlm.load(trained)
    assert_same_bits(params, jaxlm.load(trained / "checkpoints" / "40").params)
    assert isinstance(tokenizer, Bytes) and cfg.steps == 40
    assert model.apply(params, {"inputs": TOKENS}).shape == (1, 7, 257)


def test_a_run_by_cudnns_attention_is_read_without_a_gpu(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    file = run / "config.json"
    file.write_text(file.read_text().replace('"attention": "auto"', '"attention": "cudnn"'))
    loaded = jaxlm.load(run)
    assert loaded.config.model.attention == "cudnn"
    np.testing.assert_array_equal(logits(loaded), logits(jaxlm.load(trained)))


def test_nothing_but_parameters_is_read(trained, monkeypatch):
    monkeypatch.setattr(Checkpoints, "restore", lambda *_: pytest.fail("it reads the state"))
    jaxlm.load(trained)


def test_a_step_is_that_step(trained):
    older = jaxlm.load(str(trained / "checkpoints" / "20"))
    assert locate(trained / "checkpoints" / "20") == Located(trained, 20)
    assert np.any(logits(older) != logits(jaxlm.load(trained)))


def test_parameters_are_on_a_device(trained, folder):
    for spec in (trained, folder):
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(jaxlm.load(spec).params))


def test_a_hugging_face_directory_is_the_same_model(trained, folder):
    assert locate(folder) == Located(folder, None)
    ours, theirs = jaxlm.load(trained), jaxlm.load(folder)
    assert_same_bits(theirs.params, ours.params)
    np.testing.assert_array_equal(logits(theirs), logits(ours))
    np.testing.assert_array_equal(theirs.tokenizer.encode("é x\n"), ours.tokenizer.encode("é x\n"))
    assert theirs.config.data.tokenizer == str(folder)
    assert theirs.config.model.context_length == 16


def test_what_transformers_saved_computes_what_transformers_computes(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = dict(n_layer=2, n_head=2, n_embd=16, n_positions=16, n_inner=40, vocab_size=300, tie_word_embeddings=False)
    theirs = GPT2LMHeadModel(GPT2Config(**shape, activation_function="relu", scale_attn_by_inverse_layer_idx=True))
    theirs.eval().save_pretrained(tmp_path)
    for name, text in tokenizer_export.files(Bytes(), 16).items():
        (tmp_path / name).write_text(text)
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    found = logits(jaxlm.load(tmp_path))
    assert np.abs(found - expected).max() <= 2e-4 * np.abs(expected).max()


def test_a_hub_id_is_found_in_the_cache_without_a_network(folder, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = cached(tmp_path, "owner/tiny")
    shutil.copytree(folder, snapshot, dirs_exist_ok=True)
    found = jaxlm.load("owner/tiny")
    assert_same_bits(found.params, jaxlm.load(folder).params)
    assert found.config.data.tokenizer == "owner/tiny"
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    with pytest.raises(DataError, match="pytorch_model.bin is a pickle.*save_pretrained"):
        jaxlm.load("owner/tiny")
    with pytest.raises(DataError, match="As a hub id: 'owner/other' is not in the local Hugging Face cache.*HF_HOME"):
        jaxlm.load("owner/other")


def test_a_mistyped_path_names_the_nearest_and_is_not_looked_for_in_the_hub(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlm.hub.snapshot", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(trained.parent.parent)
    relative = f"{trained.parent.name}/rum"  # could be owner/name, but for the folder that is here
    for spec in (trained.with_name("rum"), relative, trained.with_name("rum") / "checkpoints" / "20"):
        with pytest.raises(DataError, match=r"no checkpoint at .*rum.*did you mean .*/run\?.*a run directory"):
            locate(spec)
    for spec in ("no such model", "~no-such-user/run"):
        with pytest.raises(DataError, match=f"no checkpoint at '{spec}'.*expected"):
            locate(spec)


def test_a_name_that_is_neither_here_nor_in_the_hub_says_both(trained, monkeypatch):
    monkeypatch.chdir(trained.parent)
    with pytest.raises(DataError, match=r"no checkpoint at 'rum'.*did you mean run\?.*As a hub id: 'rum' is not in"):
        locate("rum")


def test_a_step_or_checkpoints_that_are_not_there_are_named(trained, tmp_path):
    with pytest.raises(DataError, match="no checkpoint of step 30 in .*there are: 20, 40"):
        locate(trained / "checkpoints" / "30")
    shutil.copy(trained / "config.json", tmp_path)
    with pytest.raises(DataError, match="has no checkpoints yet"):
        locate(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(DataError, match="has no checkpoints yet"):
        locate(tmp_path)


@pytest.mark.parametrize("place", ["verify", "_files", "params"])
def test_what_a_run_removes_while_it_is_read_is_not_damaged(trained, tmp_path, monkeypatch, capsys, place):
    """The run beside it goes on, and has another latest step."""
    run = shutil.copytree(trained, tmp_path / "run")
    module, real = (Checkpoints, Checkpoints.params) if place == "params" else (manifest, getattr(manifest, place))

    def removed_first(*args):
        shutil.rmtree(run / "checkpoints" / "40", ignore_errors=True)
        if place == "_files" and args[0].name == "40":
            raise FileNotFoundError(2, "No such file or directory", str(args[0]))
        return real(*args)

    monkeypatch.setattr(module, place, removed_first)
    with pytest.raises(
        DataError, match=r"40 was removed while it was read, as a run .*\(checkpoint.keep\); there are: 20$"
    ):
        if place == "params":
            read_params(Located(run, 40), jaxlm.load(trained).config)
        StepFolders(run / "checkpoints", writable=False).whole(40)
    shutil.copytree(trained / "checkpoints" / "40", run / "checkpoints" / "40")
    assert_same_bits(jaxlm.load(run).params, jaxlm.load(trained / "checkpoints" / "20").params)
    assert "damaged" not in capsys.readouterr().err


def test_a_step_that_goes_while_orbax_lists_them_is_looked_past(trained, monkeypatch):
    real, errors = Checkpoints._open, iter([FileNotFoundError(2, "No such file or directory", "40")])

    def opened(self):
        for error in errors:
            raise error
        return real(self)

    monkeypatch.setattr(Checkpoints, "_open", opened)
    jaxlm.load(trained)


@pytest.mark.parametrize("place", ["checkpoints", ".."])
def test_a_folder_beside_the_right_one_names_that(trained, place):
    with pytest.raises(DataError, match=r"has no config.json.*Did you mean '.*run'\?"):
        locate((trained / place).resolve())


@pytest.mark.parametrize("text", ["{", "[]", "\udce9", '{"architectures": ["GPT2LMHeadModel"]}'])
def test_a_folder_whose_config_is_not_one_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(DataError, match=r"config\.json"):
        locate(tmp_path)


def test_a_file_is_no_checkpoint(copy):
    with pytest.raises(DataError, match="is not a folder; expected"):
        locate(copy / "model.safetensors")


def test_a_directory_without_a_tokenizer_is_refused(copy):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(DataError, match="has no tokenizer; put the tokenizer.json there"):
        jaxlm.load(copy)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(copy):
    for name, text in tokenizer_export.files(Chars("".join(map(chr, range(1000, 1400)))), 16).items():
        (copy / name).write_text(text)
    with pytest.raises(DataError, match="401 ids, its model only 257"):
        jaxlm.load(copy)


def test_an_architecture_that_is_not_gpt2_is_refused(copy):
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | {"model_type": "llama"}))
    with pytest.raises(DataError, match="llama"):
        jaxlm.load(copy)


def test_a_damaged_step_is_an_error_that_names_it(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    for file in (run / "checkpoints" / "40" / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match="checkpoints/40.*damaged"):
        jaxlm.load(run)


def test_of_a_python_object_that_means_its_average_that_is_loaded(tmp_path):
    raw = config.resolve(tiny()).to_dict()
    made = optax.contrib.schedule_free_adamw(1e-2)
    raw["optimizer"] = {"chain": ("freeze", "it"), "it": {"transform": made}, "freeze": {"where": "embeddings"}}
    result = jaxlm.train(config.ConfigDict(raw), tmp_path / "run")
    average = evaluation_params(result.state.opt_state, result.state.params)[""]
    loaded = jaxlm.load(tmp_path / "run").params
    assert_same_bits(loaded, average)
    assert (loaded["ln_f"]["scale"] != result.state.params["ln_f"]["scale"]).any()


def test_of_a_run_that_means_its_average_the_state_is_checked_too(tmp_path, monkeypatch):
    (tmp_path / "averaging.py").write_text(
        "from optax import contrib\ndef mine(learning_rate):\n    return contrib.schedule_free_adamw(learning_rate)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)  # found by what its state is, not by its name
    raw = config.resolve(tiny()).to_dict()
    raw["optimizer"] = {"chain": ("it",), "it": {"transform": "averaging:mine", "learning_rate": 1e-2}}
    result = jaxlm.train(config.ConfigDict(raw), tmp_path / "run")
    average = evaluation_params(result.state.opt_state, result.state.params)[""]
    assert_same_bits(jaxlm.load(tmp_path / "run").params, average)
    largest = max((tmp_path / "run/checkpoints/8/state").rglob("*"), key=lambda path: path.stat().st_size)
    flipped = bytearray(largest.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    largest.write_bytes(flipped)
    with pytest.raises(DataError, match="checkpoints/8.*damaged"):
        jaxlm.load(tmp_path / "run")


def test_the_last_checkpoint_tells_that_a_run_stopped_early_and_what_its_result_is(tmp_path):
    changes = {"eval__every": 2, "early_stopping__patience": 2, "early_stopping__min_delta": 1e-3}
    jaxlm.train(tiny(**changes, optimizer__scale_by_learning_rate__peak=0.0), tmp_path / "run")  # nothing improves
    (tmp_path / "run/status.json").unlink()
    assert locate(tmp_path / "run").step == 2
    told = max((tmp_path / "run/checkpoints/6/data").iterdir(), key=lambda path: path.stat().st_size)
    before = told.read_bytes()
    told.write_bytes(before[:10])  # so nothing tells the result, and the latest step is not taken for it
    with pytest.raises(DataError, match=r"checkpoints/6 is damaged \(data/.*\); others that are there: .*2"):
        locate(tmp_path / "run")
    told.write_bytes(before)
    shutil.rmtree(tmp_path / "run/checkpoints/2")
    with pytest.raises(DataError, match=r"the result of .*run. is its best step, 2, and .* is gone; .*checkpoints/6"):
        locate(tmp_path / "run")
    assert locate(tmp_path / "run/checkpoints/6").step == 6


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_this_folder(trained, monkeypatch, name):
    monkeypatch.chdir(trained)
    with pytest.raises(ConfigError, match="the checkpoint's name is empty; expected a run directory"):
        locate(name)


def test_a_config_that_is_a_pipe_keeps_no_one_waiting(trained, tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(DataError, match="config.json is not a file"):
        locate(tmp_path)
    with pytest.raises(DataError, match="config.json is not a file"):
        rundir.read_config(tmp_path)
