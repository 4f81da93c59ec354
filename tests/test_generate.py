import json

import pytest

from jaxlm import generate
from jaxlm.data.tokenizers import Bytes


def call(run, *flags):
    return generate.main([f"--checkpoint={run}", *flags])


def test_it_prints_the_prompt_and_its_continuation(trained, capsys):
    assert call(trained, "--prompt=def ", "--max_tokens=10") == 0
    assert capsys.readouterr().out.startswith("def ")


def test_json_has_a_line_for_each_prompt_with_its_tokens(trained, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("import\nfrom x\n")
    assert call(trained, "--prompt=", f"--prompts={tmp_path / 'prompts.txt'}", "--max_tokens=8", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["", "import", "from x"]
    for line in lines:
        assert len(line["tokens"]) <= 8
        assert line["text"] == Bytes().decode(line["tokens"])


def test_a_seed_gives_the_same_text_and_another_seed_another(trained, capsys):
    texts = []
    for seed in (1, 1, 2):
        assert call(trained, "--prompt=def ", f"--seed={seed}", "--temperature=1", "--max_tokens=40") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_it_goes_on_beyond_the_context(trained, capsys):
    assert call(trained, "--prompt=class ", "--max_tokens=100", "--temperature=0", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 100  # the context is 16


def test_a_prompt_longer_than_the_context_is_read_from_its_end(trained, capsys):
    assert call(trained, f"--prompt={'x' * 50}", "--max_tokens=4", "--json", "--temperature=0") == 0
    long = json.loads(capsys.readouterr().out)["tokens"]
    assert call(trained, f"--prompt={'x' * 8}", "--max_tokens=4", "--json", "--temperature=0") == 0
    assert long == json.loads(capsys.readouterr().out)["tokens"]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--prompt=a", "--temperature=-1"], 2, "--temperature is -1.0"),
        (["--prompt=a", "--temperature=nan"], 2, "--temperature is nan"),
        (["--prompt=a", "--top_p=0"], 2, "--top_p is 0.0"),
        (["--prompt=a", "--top_k=-1"], 2, "--top_k is -1"),
        (["--prompt=a", "--max_tokens=0"], 2, "--max_tokens is 0"),
        ([], 2, "nothing to continue"),
        (["--prompts=/no/such/file"], 4, "/no/such/file"),
    ],
)
def test_bad_flags(flags, code, message, trained, capsys):
    assert call(trained, *flags) == code
    assert message in capsys.readouterr().err


def test_a_checkpoint_that_is_not_there(tmp_path, capsys):
    assert call(tmp_path / "nothing", "--prompt=a") == 4
    assert "no checkpoint at" in capsys.readouterr().err
