import io
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxlm import generate
from jaxlm.data.tokenizers import Bytes
from jaxlm.evals import generation


def call(run, *flags):
    return generate.main([f"--checkpoint={run}", *flags])


@pytest.fixture
def objects(trained, capsys):
    """(*flags) -> the objects that --json prints."""

    def run(*flags):
        assert call(trained, "--json", *flags) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def test_it_prints_the_prompt_and_its_continuation(trained, capsys):
    assert call(trained, "--prompt=def ", "--max_tokens=10") == 0
    assert capsys.readouterr().out.startswith("def ")


def test_json_has_a_line_for_each_prompt_with_its_tokens(objects, tmp_path):
    (tmp_path / "prompts.txt").write_text("import\nfrom\x0cx\r\n\n")
    found = objects("--prompt=", f"--prompts={tmp_path / 'prompts.txt'}", "--max_tokens=8")
    assert [line["prompt"] for line in found] == ["", "import", "from\x0cx", ""]
    for line in found:
        assert list(line) == ["prompt", "text", "tokens", "logprobs", "finish_reason", "seed"]
        assert len(line["tokens"]) == len(line["logprobs"]) <= 8
        assert line["text"] == Bytes().decode(line["tokens"])
        assert line["finish_reason"] == "length" and all(value < 0 for value in line["logprobs"])
    assert_same(found[0], found[3])


def test_a_seed_gives_the_same_text_and_another_seed_another(trained, capsys):
    texts = []
    for seed in (1, 1, 2):
        assert call(trained, "--prompt=def ", f"--seed={seed}", "--temperature=1", "--max_tokens=40") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def assert_same(one: dict, other: dict) -> None:
    """Equal but for rounding: rows of another batch, or of another place in it, may be summed in another order."""
    assert one.keys() == other.keys()
    assert all(one[key] == other[key] for key in one if key != "logprobs")
    np.testing.assert_allclose(one["logprobs"], other["logprobs"], rtol=1e-5)


def test_samples_have_seeds_that_draw_them_again(objects):
    first, second = objects("--prompt=def ", "--num_samples=2", "--seed=7", "--max_tokens=8")
    assert (first["seed"], second["seed"]) == (7, 8) and first["text"] != second["text"]
    (again,) = objects("--prompt=def ", "--seed=8", "--max_tokens=8")
    assert_same(again, second)


def test_it_goes_on_beyond_the_context_or_stops(objects):
    (slid,) = objects("--prompt=class ", "--max_tokens=100", "--temperature=0")
    assert len(slid["tokens"]) == 100  # the context is 16
    (stopped,) = objects("--prompt=class ", "--max_tokens=100", "--temperature=0", "--beyond=stop")
    assert stopped["tokens"] == slid["tokens"][: 16 - len("class ")] and stopped["finish_reason"] == "length"


def test_a_prompt_longer_than_the_context_is_read_from_its_end(trained, capsys):
    flags = ["--max_tokens=4", "--json", "--temperature=0"]
    assert call(trained, f"--prompt={'y' * 42 + 'x' * 8}", *flags) == 0
    long = capsys.readouterr()
    assert long.err == f"--prompt {'y' * 20!r}... has 50 tokens, and the model's context is 16: its last 8 are read\n"
    assert call(trained, f"--prompt={'x' * 8}", *flags) == 0
    assert json.loads(long.out)["tokens"] == json.loads(capsys.readouterr().out)["tokens"]


def test_a_prompt_that_fills_the_context_leaves_nothing_to_stop_at(trained, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("short\n" + "x" * 16)
    assert call(trained, f"--prompt={'x' * 16}", "--beyond=stop") == 2
    assert capsys.readouterr().err.startswith("error: --prompt 'xxxxxxxxxxxxxxxx'... has 16 tokens")
    assert call(trained, f"--prompts={tmp_path / 'prompts.txt'}", "--beyond=stop") == 4
    out, err = capsys.readouterr()
    assert "prompts.txt:2 'xxx" in err and err.count("\n") == 1 and out == ""


def test_a_text_ends_before_a_stop_string(objects):
    flags = ["--prompt=def ", "--max_tokens=40", "--temperature=1"]
    (free,) = objects(*flags)
    stop = free["text"][5:7]
    (found,) = objects(*flags, f"--stop={stop}", "--stop=\N{SNOWMAN}")
    assert found["text"] == free["text"][: free["text"].index(stop)] and found["finish_reason"] == "stop"
    assert found["tokens"] == free["tokens"][: len(found["tokens"])]


def test_the_penalty_changes_the_text(objects):
    flags = ["--prompt=def ", "--max_tokens=20", "--temperature=0"]
    (plain,), (penalized,) = objects(*flags), objects(*flags, "--repetition_penalty=1000")
    assert len(set(penalized["tokens"])) == 20 > len(set(plain["tokens"]))


@pytest.mark.parametrize("flags", [[], ["--temperature=2", "--stop=e", "--stop=\n "]], ids=["plain", "wild"])
def test_a_stream_prints_the_same(flags, trained, capsys):
    outputs = []
    for stream in ("--stream", "--no-stream"):
        assert call(trained, "--prompt=def ", "--max_tokens=60", stream, *flags) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != "def \n"


def test_one_text_streams_to_a_terminal_only(trained, monkeypatch):
    class Terminal(io.StringIO):
        def __init__(self, is_terminal):
            super().__init__()
            self.is_terminal, self.writes = is_terminal, 0

        def isatty(self):
            return self.is_terminal

        def write(self, text):
            self.writes += bool(text.strip())
            return super().write(text)

    def writes(is_terminal, *flags):
        monkeypatch.setattr(sys, "stdout", Terminal(is_terminal))
        assert call(trained, "--prompt=def ", "--max_tokens=30", "--seed=1", *flags) == 0
        return sys.stdout.writes

    assert writes(True) > 10
    assert writes(False) == writes(True, "--json") == writes(True, "--no-stream") == 1
    assert writes(True, "--num_samples=2") == 2
    assert writes(False, "--stream") > 10


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--prompt=a", "--temperature=-1"], 2, "--temperature is -1.0"),
        (["--prompt=a", "--temperature=nan"], 2, "--temperature is nan"),
        (["--prompt=a", "--top_p=0"], 2, "--top_p is 0.0"),
        (["--prompt=a", "--top_k=-1"], 2, "--top_k is -1"),
        (["--prompt=a", "--repetition_penalty=0"], 2, "--repetition_penalty is 0.0"),
        (["--prompt=a", "--max_tokens=0"], 2, "error: --max_tokens is 0; expected at least 1"),
        (["--prompt=a", "--num_samples=0"], 2, "--num_samples is 0"),
        (["--prompt=a", "--seed=4294967295", "--num_samples=2"], 2, "--seed is 4294967295"),
        (["--prompt=a", "--stop="], 2, "--stop is ['']"),
        (["--prompt=a", "--stop=\udcff"], 2, "'\\udcff' on the command line is not UTF-8"),
        (["--prompt=a\udce9"], 2, "'a\\udce9' on the command line is not UTF-8"),
        (["--prompt=a", "--json", "--stream"], 2, "--stream prints one text"),
        (["--prompt=a", "--prompt=b", "--stream"], 2, "--stream prints one text"),
        ([], 2, "nothing to continue"),
        (["--prompts=/no/such/file"], 4, "/no/such/file"),
        (["--prompts=", "--prompt=x"], 4, "--prompts= is empty; expected a file"),
        (["--prompts=/dev/null"], 4, "/dev/null is empty"),
    ],
)
def test_bad_flags(flags, code, message, trained, capsys):
    assert call(trained, *flags) == code
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and out == ""


def test_a_file_of_prompts_that_is_not_utf_8(trained, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"a\n\xff\n")
    assert call(trained, f"--prompts={tmp_path / 'prompts.txt'}") == 4
    assert "prompts.txt is not UTF-8: byte 2" in capsys.readouterr().err


def test_bytes_on_the_command_line_that_are_not_utf_8(trained):
    command = [sys.executable, "-m", "jaxlm.generate", f"--checkpoint={trained}", b"--prompt=\xff"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: '\\udcff' on the command line is not UTF-8\n"


@pytest.mark.parametrize("flag", ["--stream", "--no-stream"])
def test_a_terminal_that_is_not_utf_8_gets_question_marks(trained, monkeypatch, flag):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert call(trained, "--prompt=é ", "--max_tokens=2", flag) == 0
    out.flush()
    assert out.buffer.getvalue().startswith(b"? ")


def test_a_checkpoint_that_is_not_there(tmp_path, capsys):
    assert call(tmp_path / "nothing", "--prompt=a") == 4
    assert "no checkpoint at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--num_samples=3", "give fewer than 3 texts at a time, or --max_tokens"),
        ("", "one row at a time is too much for this device"),
    ],
)
def test_too_little_memory_is_one_line(trained, capsys, monkeypatch, flags, said):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room for 7.28 TiB\nand more")

    monkeypatch.setattr(generation, "complete", full)
    assert call(trained, "--prompt=a", *flags.split()) == 2
    assert capsys.readouterr().err == f"error: out of memory: RESOURCE_EXHAUSTED: no room for 7.28 TiB; {said}\n"
