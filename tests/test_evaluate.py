import json

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import evaluate
from jaxlm.data import tokenizers, write_tokens


def call(*flags):
    return evaluate.main(list(flags))


def test_the_whole_held_out_split_token_by_token(trained, capsys):
    assert call(f"--checkpoint={trained}", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    loaded = jaxlm.load(trained)
    from jaxlm import data

    split = data.open(loaded.config.data).validation
    T = loaded.config.model.context_length
    tokens = np.asarray(split.tokens, np.int64)
    apply = jax.jit(loaded.program.model.apply)
    total = correct = 0.0
    for first in range(0, len(tokens) - 1, T):
        window = tokens[first : first + T + 1]
        padded = np.zeros((1, T), np.int32)
        padded[0, : len(window) - 1] = window[:-1]
        logits = np.asarray(apply(loaded.state.params, {"inputs": padded}))[0, : len(window) - 1].astype(np.float64)
        log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        total += (log_z - logits[np.arange(len(logits)), window[1:]]).sum()
        correct += (logits.argmax(-1) == window[1:]).sum()
    count = len(tokens) - 1
    assert found["tokens"] == count
    assert found["eval/loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["eval/accuracy"] == pytest.approx(correct / count, rel=1e-5)
    assert found["eval/perplexity"] == pytest.approx(np.exp(total / count), rel=1e-4)
    bits = total / count / np.log(2) * len(tokens) / split.num_bytes
    assert found["eval/bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_other_text_and_an_older_step(trained, capsys, tmp_path):
    (tmp_path / "other.txt").write_text("def f(x):\n    return x\n" * 20)
    steps = sorted((trained / "checkpoints").iterdir())
    results = []
    for checkpoint in (trained, steps[0]):
        assert call(f"--checkpoint={checkpoint}", f"--data={tmp_path / 'other.txt'}", "--json") == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["tokens"] == results[1]["tokens"] == 460
    assert results[0]["step"] > results[1]["step"]
    assert results[0]["eval/loss"] != results[1]["eval/loss"]
    assert call(f"--checkpoint={trained}") == 0
    assert "eval/bits_per_byte" in capsys.readouterr().out


def test_tokens_of_another_tokenizer_are_refused(trained, capsys, tmp_path):
    other = tokenizers.build("chars", ["abc"])
    write_tokens(tmp_path / "t.bin", [other.encode("abcabc")], other)
    assert call(f"--checkpoint={trained}", f"--data={tmp_path / 't.bin'}") == 4
    assert "another tokenizer" in capsys.readouterr().err


def test_missing_things_are_named(trained, capsys, tmp_path):
    assert call(f"--checkpoint={tmp_path / 'none'}") == 4
    assert "no checkpoint at" in capsys.readouterr().err
    assert call(f"--checkpoint={trained / 'checkpoints' / '999'}") == 4
    assert "no checkpoint of step 999" in capsys.readouterr().err
    assert call(f"--checkpoint={trained}", "--data=nowhere.txt") == 4
    assert "nowhere.txt" in capsys.readouterr().err
