"""The model card: what it says is what the run recorded, and no more."""

import ast
import json
import re

import numpy as np
import pytest

import jaxlm
from jaxlm import config, config_json
from jaxlm.telemetry.writers import read_jsonl
from jaxlm.training.card import card
from jaxlm.training.load import Loaded, Located, locate

NAME = "my-model"


@pytest.fixture(scope="module")
def loaded(trained):
    return jaxlm.load(trained)


def table(text):
    """{first cell: the other cells} of all rows."""
    rows = re.findall(r"^\| (.*) \|$", text, re.MULTILINE)
    return {cells[0].strip("`"): cells[1:] for cells in (row.split(" | ") for row in rows)}


def front_matter(text):
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(text.split("---\n")[1])


def test_figures_are_those_of_the_metrics_at_that_step(trained, loaded):
    rows = read_jsonl(trained / "metrics.jsonl")
    for step in (20, 40):
        found = table(card(NAME, str(trained), locate(trained / "checkpoints" / str(step)), loaded))
        row = {name: value for row in rows if row["step"] == step for name, value in row.items()}
        for name in ("train/loss", "eval/loss", "eval/perplexity", "eval/bits_per_byte", "eval/accuracy"):
            assert found[name][0] == f"{row[name]:.4f}" and found[name][-1] == str(step)
        assert found["steps"] == [f"{step} of 40"]
        assert found["tokens seen"] == [f"{step * 4 * 16:,}"] and row["data/tokens"] == step * 4 * 16


def test_it_says_what_was_evaluated(trained, loaded):
    for batches, words in (
        (2, "at most 2 batches of 64 tokens spread over the held-out text"),
        (0, "all of the held-out text"),
    ):
        assert f"are over {words}" in card(
            NAME, "run", locate(trained), with_config(loaded, **{"eval.batches": batches})
        )


def test_tokens_after_the_last_row_count_too(trained, loaded, tmp_path):
    rows = [{"step": 30, "data/tokens": 999.0}, {"step": 50, "data/tokens": 5000.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert table(card(NAME, "run", Located(tmp_path, 40), loaded))["tokens seen"] == [f"{999 + 10 * 4 * 16:,}"]


def test_energy_is_there_where_it_was_measured(trained, loaded, tmp_path):
    assert "energy/" not in card(NAME, str(trained), locate(trained), loaded)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 40, "energy/joules_per_token": 0.0125}) + "\n")
    found = card(NAME, "run", Located(tmp_path, 40), loaded)
    assert table(found)["energy/joules_per_token"] == ["0.0125"]
    assert "## Results" not in found


def test_a_run_without_metrics_has_a_card(loaded, tmp_path):
    found = card(NAME, "run", Located(tmp_path, 40), loaded)
    assert "## Results" not in found and table(found)["tokens seen"] == ["2,560"]


def test_parameters_are_those_that_mean_something(trained, loaded):
    V, T, D, F = 257, 16, 16, 64
    block = 2 * 2 * D + (D + 1) * 3 * D + (D + 1) * D + (D + 1) * F + (F + 1) * D
    assert f"model of {V * D + T * D + block + 2 * D:,} parameters" in card(NAME, "run", locate(trained), loaded)


def test_low_rank_products_are_in_no_export(trained, loaded):
    with_products = loaded._replace(params=loaded.params | {"lora": {"a": np.zeros((4, 16))}})
    assert card(NAME, "run", locate(trained), with_products) == card(NAME, "run", locate(trained), loaded)


def test_front_matter_is_yaml_and_leaves_the_license_open(trained, loaded):
    found = front_matter(card(NAME, str(trained), locate(trained), loaded))
    assert found["library_name"] == "transformers" and found["tags"] == ["gpt2", "jaxlm"]
    assert found.keys() == {"library_name", "pipeline_tag", "tags"}


def with_config(loaded: Loaded, **changes):
    cfg = config.override(config.default(), config.flat(loaded.config) | changes)
    return loaded._replace(config=config.resolve(cfg))


def test_a_base_model_is_named_where_it_is_one_of_the_hub(trained, loaded, monkeypatch, tmp_path):
    from_hub = card(NAME, "run", locate(trained), with_config(loaded, init_from="owner/gpt"))
    assert front_matter(from_hub)["base_model"] == "owner/gpt"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    for local in ("runs/first", str(tmp_path)):
        found = card(NAME, "run", locate(trained), with_config(loaded, init_from=local))
        assert "base_model" not in front_matter(found) and table(found)["started from"] == [f"`{local}`"]


def test_the_config_in_it_is_the_run_s_and_names_no_other_path(trained, loaded):
    found = card(NAME, str(trained), locate(trained), loaded)
    block = re.search(r"```json\n(.*?)\n```", found, re.DOTALL)[1]
    assert config_json.from_json(block) == loaded.config
    paths = re.findall(r"(?<![\w:/.])/[\w.-]+/[\w./-]+", found)
    assert set(paths) == {loaded.config.data.source}


def test_it_holds_no_secrets(loaded, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "a|canary|in the environment")
    fields = {"data.source": "https://me:canary@example.com/x", "init_from": "a|canary|in the environment"}
    found = card(NAME, "run", Located(tmp_path, 40), with_config(loaded, **fields))
    assert "canary" not in found and table(found)["data"] == ["`https://<redacted>@example.com/x`"]
    block = re.search(r"```json\n(.*?)\n```", found, re.DOTALL)[1]
    assert config_json.from_json(block).init_from == "<redacted>"


def test_its_python_is_python_that_runs(trained, loaded, tmp_path, monkeypatch):
    found = card(NAME, str(trained), locate(trained), loaded)
    blocks = re.findall(r"```python\n(.*?)\n```", found, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        ast.parse(block)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jaxlm_config.json").write_text(re.search(r"```json\n(.*?)\n```", found, re.DOTALL)[1])
    monkeypatch.setattr(jaxlm, "train", lambda cfg, workdir: trained_again.append((cfg, workdir)), raising=False)
    trained_again = []
    exec(blocks[-1], {})
    assert trained_again == [(loaded.config, "runs/again")]


def test_of_another_source_it_says_what_is_known(loaded, tmp_path):
    for source in (str(tmp_path), "owner/gpt"):
        found = card(NAME, source, Located(tmp_path, None), loaded)
        assert "## Training" not in found and "## Config" not in found and str(tmp_path) not in found
        assert front_matter(found).get("base_model") == (None if "/" == source[0] else source)
    assert "parameters, copied from `owner/gpt`." in found


def test_weird_values_do_not_break_the_table(loaded, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 40, "eval/loss": "nan"}\n')
    found = card(NAME, "run", Located(tmp_path, 40), with_config(loaded, **{"data.source": "a|b"}))
    assert table(found)["eval/loss"][0] == "nan"
    assert "`a\\|b`" in found
