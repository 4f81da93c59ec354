"""How a study was done, in words."""

import json

import jax

from jaxlm.ablation import methods, plan, runner
from tests.ablation.small import small

HERE = {"device": "cpu", "jax": "1.0", "jaxlm": "0.1"}


def said(*machines, **fields):
    made = small(**fields)
    return methods.setup(made, plan.budgeted(made, "clip", None, plan.Memory()), machines)


def test_the_setup_says_what_a_paper_says():
    found = said(HERE, HERE)
    # 384 · 16 token embeddings, padded; 16 · 16 positions; attention, feed-forward and norms of one layer
    assert 6144 + 256 + (4 * 16 * 16 + 4 * 16) + (2 * 16 * 64 + 16 + 64) + 6 * 16 == 9712
    assert found["Model"].startswith("GPT-2, 9,712 parameters: 1 layer of width 16, 2 heads")
    assert "context of 16 tokens, vocabulary of 257" in found["Model"] and found["Weights"] == "random"
    assert "tokenizer bytes" in found["Data"] and found["Training"] == "12 steps of 4 sequences, 768 tokens"
    assert found["Seeds"] == "0, 1" and found["Intervals"].startswith("95%") and found["Power"].startswith("80%")
    assert (found["Versions"], found["Device"]) == ("jaxlm 0.1; jax 1.0", "cpu")
    assert found["Base config"].startswith("a config made in Python") and "“clip”" in found["Base config"]
    assert said({}, {})["Versions"] == said({}, {})["Device"] == "not recorded"
    assert said(HERE, {})["Device"] == "cpu (1 of 2 trials; of the others not recorded)"


def test_trials_of_different_versions_or_devices_are_a_doubt():
    assert methods.mixed([HERE, HERE, {}]) == []
    (line,) = methods.mixed([HERE, {**HERE, "device": "H100"}, {**HERE, "jax": "1.1"}])
    assert line.endswith(": device H100, cpu; jax 1.0, 1.1")


def test_a_trial_notes_what_trained_it_and_the_report_says_so_whoever_writes_it(tmp_path, monkeypatch):
    made = small(steps=4, variants={"clip": {}, "b2": {"optimizer.scale_by_adam.b2": 0.9}})
    runner.run(made, tmp_path)
    notes = [json.loads(path.read_text())["machine"] for path in tmp_path.glob("trials/*/trial.json")]
    assert len(notes) == 4 and all(note == methods.machine() for note in notes)
    assert notes[0]["jax"] == jax.__version__
    texts = {name: (tmp_path / name).read_bytes() for name in ("report.md", "report.html", "results.csv")}
    for name in ("report.md", "report.html"):
        text = texts[name].decode()
        assert "Setup" in text and f"jax {jax.__version__}" in text and jax.devices()[0].device_kind in text
    monkeypatch.setattr(methods, "machine", lambda: {"device": "another", "jax": "9"})
    runner.run(made, tmp_path)
    assert texts == {name: (tmp_path / name).read_bytes() for name in texts}
    path = next(tmp_path.glob("trials/*/trial.json"))
    path.write_text(path.read_text().replace(jax.__version__, "0.0.1"))
    assert "different versions" in runner.run(made, tmp_path).warnings[-1]
    for path in tmp_path.glob("trials/*/trial.json"):
        path.write_text(json.dumps({"beside": 1}))  # as older ones are
    runner.run(made, tmp_path)
    assert "**Device**: not recorded." in (tmp_path / "report.md").read_text()
