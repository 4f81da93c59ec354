"""An exported folder, as transformers and jaxlm read it."""

import errno

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import config_json
from jaxlm.errors import ConfigError, DataError
from jaxlm.model import huggingface
from jaxlm.training.export import export

TEXT = "def f(x):\n    return  x  # 🙂 é\n"
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
OF_A_RUN = FILES | {"jaxlm_config.json"}


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    return export(trained, tmp_path_factory.mktemp("exported") / "model")


def test_the_folder_is_that_of_save_pretrained(trained, exported):
    assert {path.name for path in exported.iterdir()} == OF_A_RUN
    assert [path.name for path in exported.parent.iterdir()] == ["model"]
    config = config_json.from_json((exported / "jaxlm_config.json").read_text())
    assert config == jaxlm.load(trained).config  # as its card says


def test_transformers_gives_the_same_ids_and_logits(trained, exported):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, params, tokenizer, _ = jaxlm.load(trained)
    theirs, report = AutoModelForCausalLM.from_pretrained(str(exported), output_loading_info=True)
    assert not any(report.values()), report
    ids = AutoTokenizer.from_pretrained(str(exported))(TEXT)["input_ids"]
    assert ids == tokenizer.encode(TEXT).tolist()
    inputs = np.array([ids[:16], ids[-16:]], np.int32)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(inputs, dtype=torch.long)).logits.numpy()
    logits = np.asarray(jax.jit(model.apply)(params, {"inputs": inputs}))
    assert np.abs(logits - expected).max() <= 2e-4 * np.abs(expected).max()
    assert np.abs(logits[0] - logits[1]).max() > 2e-4 * np.abs(expected).max()
    assert theirs.generation_config.eos_token_id == tokenizer.end_of_text


def test_jaxlm_reads_the_same_model_back(trained, exported):
    ours, again = jaxlm.load(trained), jaxlm.load(exported)
    np.testing.assert_array_equal(again.tokenizer.encode(TEXT), ours.tokenizer.encode(TEXT))
    assert again.tokenizer.decode(ours.tokenizer.encode(TEXT)) == TEXT
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), again.params, ours.params))


def test_an_export_of_an_export_is_the_same_bits(exported, tmp_path):
    again = export(exported, tmp_path / "again")
    assert {path.name for path in again.iterdir()} == FILES
    for name in FILES - {"README.md"}:
        assert (again / name).read_bytes() == (exported / name).read_bytes(), name


def test_an_older_step_is_another_model(trained, exported, tmp_path):
    older = export(trained / "checkpoints" / "20", tmp_path / "older")
    assert (older / "model.safetensors").read_bytes() != (exported / "model.safetensors").read_bytes()


def test_an_empty_folder_may_be_there(exported, tmp_path):
    (tmp_path / "out").mkdir()
    assert export(exported, tmp_path / "out") == tmp_path / "out"
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


@pytest.mark.parametrize("place", ["file", "folder"])
def test_nothing_is_overwritten(exported, tmp_path, place):
    out = tmp_path / "out"
    if place == "folder":
        out.mkdir()
    (out if place == "file" else out / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match=f"{out}' exists and is not an empty folder; remove it or give another"):
        export(exported, out)
    assert (out if place == "file" else out / "mine.txt").read_text() == "precious"
    assert list(tmp_path.iterdir()) == [out]


def test_a_full_disk_leaves_nothing(exported, tmp_path, monkeypatch):
    write = huggingface.write

    def full(folder, *args, **fields):
        write(folder, *args, **fields)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface, "write", full)
    with pytest.raises(DataError, match="out can't be written: No space left on device; give another --out or make"):
        export(exported, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_is_named(exported, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file/out can't be written: Not a directory"):
        export(exported, tmp_path / "file" / "out")


def test_what_is_missing_is_named_and_nothing_is_made(tmp_path):
    with pytest.raises(DataError, match="no checkpoint at"):
        export(tmp_path / "none", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_name_is_refused(trained):
    with pytest.raises(ConfigError, match="--out is empty; expected a folder"):
        export(trained, "")
