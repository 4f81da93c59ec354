"""The average that a run kept, from each of the doors that take a checkpoint, and what is said where there is none."""

import json

import pytest

import jaxlm
from jaxlm import evaluate, export, generate
from jaxlm.errors import ConfigError
from jaxlm.optim.wrappers import evaluation_params
from jaxlm.training.export import export as export_folder
from tests.runs import rows
from tests.tiny import assert_same_bits, tiny

CHAIN = ("scale_by_adam", "scale_by_learning_rate", "ema_of_params")
CHANGES = {"optimizer__ema_of_params": {"decay": 0.9}, "checkpoint__best": "eval/ema_loss", "eval__batches": 0}


@pytest.fixture(scope="module")
def averaging(tmp_path_factory):
    """(run directory, result) of a run that keeps an average of its parameters and is judged by it."""
    workdir = tmp_path_factory.mktemp("averaging") / "run"
    return workdir, jaxlm.train(tiny(optimizer__chain=CHAIN, **CHANGES), workdir)


def test_load_gives_the_average_to_the_bit(averaging):
    workdir, result = averaging
    expected = evaluation_params(result.state.opt_state, result.state.params)
    average, plain = jaxlm.load(workdir, weights="ema").params, jaxlm.load(workdir).params
    assert_same_bits(average, expected["ema"])
    assert_same_bits(plain, result.state.params)
    assert (average["ln_f"]["scale"] != plain["ln_f"]["scale"]).any()


def test_evaluate_finds_the_loss_that_the_run_reported_of_it(averaging, capsys):
    workdir, _ = averaging
    reported = [row for row in rows(workdir) if "eval/loss" in row][-1]
    for flags, name in (([], "eval/loss"), (["--weights=ema"], "eval/ema_loss")):
        assert evaluate.main([f"--checkpoint={workdir}", "--json", *flags]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["eval/loss"] == pytest.approx(reported[name], rel=1e-6)
    assert abs(reported["eval/loss"] - reported["eval/ema_loss"]) > 1e-4


def test_generate_takes_it_and_export_writes_it(averaging, capsys, tmp_path):
    workdir, _ = averaging
    out = tmp_path / "out"
    assert export.main([f"--checkpoint={workdir}", f"--out={out}", "--weights=ema"]) == 0
    assert_same_bits(jaxlm.load(out).params, jaxlm.load(workdir, "ema").params)
    capsys.readouterr()
    said = []
    for flags in ([f"--checkpoint={out}"], [f"--checkpoint={workdir}", "--weights=ema"], [f"--checkpoint={workdir}"]):
        assert generate.main([*flags, "--prompt=def ", "--max_tokens=3", "--temperature=0", "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out)["logprobs"])
    assert said[0] == said[1] != said[2]
    reported = [row for row in rows(workdir) if "eval/loss" in row][-1]
    card = (out / "README.md").read_text()
    assert "| weights | an average of the parameters: `ema` |" in card
    assert f"| `eval/ema_loss` | {reported['eval/ema_loss']:.4f} | nats per token | 8 |" in card
    assert "`eval/loss`" not in card and "all of the held-out text" in card


def test_where_there_is_none_it_is_said_what_there_is(averaging, trained, tmp_path, capsys):
    with pytest.raises(ConfigError, match="weights is 'ema', and .*checkpoints/40 has no such average: there are none"):
        jaxlm.load(trained, weights="ema")
    with pytest.raises(ConfigError, match=r"weights is 'em', and .*checkpoints/8 has .*: did you mean 'ema'\?"):
        jaxlm.load(averaging[0], weights="em")
    with pytest.raises(ConfigError, match="weights is 'mean', .*: known: ema; a run keeps one, 'ema', where"):
        jaxlm.load(averaging[0], weights="mean")
    folder = f"--checkpoint={export_folder(trained, tmp_path / 'model')}"
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x\n" * 20)
    for door, flags in (
        (evaluate, [folder, f"--data={text}"]),
        (generate, [folder, "--prompt=a"]),
        (export, [folder, f"--out={tmp_path / 'out'}"]),
    ):
        assert door.main([*flags, "--weights=ema"]) == 2
        assert "weights is 'ema', and" in (err := capsys.readouterr().err) and "model has no such average" in err
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_judged_by_it_says_how_to_have_it(averaging, trained):
    said = "judged by an average: evaluate, generate and export take that with --weights=ema"
    assert said in (averaging[0] / "log.txt").read_text()
    assert said not in (trained / "log.txt").read_text()
