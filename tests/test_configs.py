"""Every config of configs/ is complete, whatever it is asked for; those on data that is made on the spot train."""

import json
import re

import pytest

from jaxlm import config, config_file, config_json, main
from jaxlm.errors import ConfigError
from tests.runs import ROOT

ARGUMENTS = {
    "ablation": [""],
    "finetune_gpt2": ["", "gpt2-medium"],
    "gpt2": ["", "124m", "350m", "774m", "1.5b"],
    "quickstart": [""],
    "sft": ["", "translation", "sentiment", "qa", "sentiment@gpt2", "qa@owner/name"],
    "shakespeare_char": ["", "cpu"],
}


def test_all_configs_are_here():
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize(("name", "arg"), [(name, arg) for name, args in ARGUMENTS.items() for arg in args])
def test_a_config_is_complete(name, arg):
    cfg = config_file.load(f"{ROOT}/configs/{name}.py" + (f":{arg}" if arg else ""))
    assert config_json.from_json(config_json.to_json(config.resolve(cfg))) == config.resolve(cfg)


@pytest.mark.parametrize(("arg", "nearest"), [("translate", "translation"), ("sentimant@gpt2", "sentiment")])
def test_a_task_that_is_none_names_the_nearest(arg, nearest):
    with pytest.raises(ConfigError, match=f"takes no argument '{re.escape(arg)}': did you mean '{nearest}'"):
        config_file.load(f"{ROOT}/configs/sft.py:{arg}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "metric"),
    [("translation", "generate/exact_match"), ("sentiment", "classify/accuracy"), ("qa", "generate/exact_match")],
)
def test_each_task_trains_and_is_scored(task, metric, tmp_path, capsys):
    small = "model.num_layers=1 model.embed_dim=16 model.context_length=192 data.batch_size=2 eval.batches=1 steps=2"
    flags = [f"--config.{field}" for field in small.split()]
    path = f"{ROOT}/configs/sft.py:{task}"
    assert main.main([f"--config={path}", f"--workdir={tmp_path}", "--config.log.progress=False", *flags]) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 0 <= rows[-1][f"eval/{metric}"] <= 1
    assert " pairs in " in capsys.readouterr().err
