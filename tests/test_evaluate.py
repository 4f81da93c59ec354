import json
import shutil

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import evaluate
from jaxlm.data import write_tokens
from jaxlm.data.tokenizers import Chars
from jaxlm.evals import perplexity
from jaxlm.training.export import export
from tests.tiny import CORPUS, tiny


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
    apply = jax.jit(loaded.model.apply)
    total = correct = 0.0
    for first in range(0, len(tokens) - 1, T):
        window = tokens[first : first + T + 1]
        padded = np.zeros((1, T), np.int32)
        padded[0, : len(window) - 1] = window[:-1]
        logits = np.asarray(apply(loaded.params, {"inputs": padded}))[0, : len(window) - 1].astype(np.float64)
        log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        total += (log_z - logits[np.arange(len(logits)), window[1:]]).sum()
        correct += (logits.argmax(-1) == window[1:]).sum()
    count = len(tokens) - 1
    assert found["step"] == 40 and found["tokens"] == count
    assert found["words"] == len(loaded.tokenizer.decode(tokens).split()) and found["bytes"] == split.num_bytes
    assert found["eval/loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["eval/accuracy"] == pytest.approx(correct / count, rel=1e-5)
    assert found["eval/perplexity"] == pytest.approx(np.exp(total / count), rel=1e-4)
    bits = total / np.log(2) / split.num_bytes
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


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    return export(trained, tmp_path_factory.mktemp("exported") / "model")


def test_an_exported_model_is_worth_as_much_as_its_run(trained, exported, capsys):
    found = []
    for checkpoint in (trained, exported):
        assert call(f"--checkpoint={checkpoint}", f"--data={CORPUS}", "--stride=5", "--json") == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0].pop("step") == 40
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_sliding_windows_are_a_loop_over_pytorch_s_model(exported, capsys, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text, T, stride = "def f(x):\n    return x + 1\n\n\nclass A:\n    é = '🙂'\n" * 3, 16, 6
    (tmp_path / "text.txt").write_text(text)
    assert call(f"--checkpoint={exported}", f"--data={tmp_path / 'text.txt'}", f"--stride={stride}", "--json") == 0
    found = json.loads(capsys.readouterr().out)

    model = AutoModelForCausalLM.from_pretrained(str(exported)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(exported))
    ids = torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
    nll, correct, scored = 0.0, 0, 0  # tokens 1, ..., scored are done
    for begin in range(0, len(ids), stride):
        end = min(begin + T, len(ids) - 1)
        with torch.no_grad():
            logits = model(ids[None, begin:end]).logits[0].double()
        new = slice(scored + 1, end + 1)
        rows = logits[scored - begin :]
        nll += torch.nn.functional.cross_entropy(rows, ids[new], reduction="sum").item()
        correct += (rows.argmax(-1) == ids[new]).sum().item()
        scored = end
        if end == len(ids) - 1:
            break
    assert scored == found["tokens"] == len(ids) - 1
    assert found["eval/loss"] == pytest.approx(nll / scored, rel=1e-5)
    assert found["eval/accuracy"] == correct / scored
    assert found["eval/word_perplexity"] == pytest.approx(np.exp(nll / len(text.split())), rel=1e-3)


def test_more_context_is_not_the_same_and_a_batch_is_only_speed(trained, capsys, tmp_path):
    (tmp_path / "other.txt").write_text("def f(x):\n    return x\n" * 20)

    def loss(*flags):
        assert call(f"--checkpoint={trained}", f"--data={tmp_path / 'other.txt'}", "--json", *flags) == 0
        return json.loads(capsys.readouterr().out)["eval/loss"]

    assert loss("--stride=8", "--batch_size=3") == pytest.approx(loss("--stride=8"), rel=1e-6)
    assert loss("--stride=8") != loss("--stride=16") == loss()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--stride=17", "stride is 17; expected from 1 to the context of 16 tokens"),
        ("--stride=-1", "stride is -1"),
        ("--batch_size=-1", "--batch_size is -1; expected at least 1"),
        ("--batch_size=10000000000000000000000", "expected at least 1 and below 2**31"),
        ("--limit=3", "--limit=3 is for tasks of the harness; give --harness=TASK too"),
        ("--num_fewshot=0", "--num_fewshot=0 is for tasks of the harness; give --harness=TASK too"),
        ("--stride=4 --harness=x.yaml", "--stride=4 is for text; give --data=PATH or --task=NAME too"),
        ("--data=", "--data is empty; expected text or tokens"),
        ("--prompt={q}", "--prompt says what other data is made of; give --data=PATH too"),
    ],
)
def test_flags_that_cannot_be_are_named(trained, capsys, flag, message):
    assert call(f"--checkpoint={trained}", *flag.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 7.28 TiB"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room for 7.28 TiB\nand more"),
    ],
)
def test_too_little_memory_is_one_line_that_names_the_flag(trained, capsys, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(perplexity, "evaluate_split", full)
    assert call(f"--checkpoint={trained}", "--batch_size=5000") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "7.28 TiB; give --batch_size below 5,000" in said
    assert call(f"--checkpoint={trained}", "--batch_size=1") == 2
    assert "7.28 TiB; one row at a time is too much for this device" in capsys.readouterr().err


def test_other_errors_of_a_device_are_not_dressed_up(trained, monkeypatch):
    def broken(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(perplexity, "evaluate_split", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        call(f"--checkpoint={trained}")


def test_as_many_windows_at_once_as_in_training(trained, monkeypatch, tmp_path):
    run, seen = tmp_path / "run", []
    shutil.copytree(trained, run)
    described = json.loads((run / "config.json").read_text())
    described["data"] |= {"batch_size": 12, "micro_batches": 4}
    (run / "config.json").write_text(json.dumps(described))

    def evaluate_split(*_, batch_size, **__):
        seen.append(batch_size)
        return {}

    monkeypatch.setattr(perplexity, "evaluate_split", evaluate_split)
    assert call(f"--checkpoint={run}", f"--data={CORPUS}") == 0
    assert call(f"--checkpoint={run}", f"--data={CORPUS}", "--batch_size=5") == 0
    assert seen == [3, 5]


PAIRS = "".join(json.dumps({"prompt": f"{i}:", "completion": "yn"[i % 2]}) + "\n" for i in range(6))


def test_a_task_on_pairs_of_a_model_of_text_is_refused_before_anything_is_scored(trained, capsys, monkeypatch):
    monkeypatch.setattr(perplexity, "evaluate_split", lambda *_, **__: pytest.fail("scored"))
    assert call(f"--checkpoint={trained}", "--task=perplexity", "--task=classify") == 2
    assert (
        f"task 'classify' compares completions of prompts, and data.format of {str(trained)!r} is 'text'; "
        "expected data.format='pairs'"
    ) in capsys.readouterr().err


def test_pairs_that_cannot_be_asked_for_are_named_before_anything_is_scored(exported, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(perplexity, "evaluate_split", lambda *_, **__: pytest.fail("scored"))
    (tmp_path / "pairs.jsonl").write_text(PAIRS)
    assert call(f"--checkpoint={exported}", f"--data={tmp_path / 'pairs.jsonl'}", "--task=choice") == 4
    assert "task 'choice': 2 different completions; expected at least 4, to choose among" in capsys.readouterr().err


def test_a_folder_is_asked_for_pairs_where_a_task_wants_them(exported, capsys, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(PAIRS)
    flags = f"--checkpoint={exported}", f"--data={tmp_path / 'pairs.jsonl'}"
    assert call(*flags, "--task=classify", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 12 and "words" not in found and 0 <= found["eval/classify/accuracy"] <= 1
    assert call(*flags) == 4
    assert "no column 'text'" in capsys.readouterr().err


def test_flags_say_what_rows_of_other_data_are_made_of(trained, exported, capsys, tmp_path):
    (tmp_path / "own.jsonl").write_text(PAIRS.replace('"prompt"', '"q"').replace('"completion"', '"a"'))
    form, found = ("--prompt={q}", "--completion={a}", "--json"), []
    (tmp_path / "usual.jsonl").write_text(PAIRS)
    for checkpoint in (trained, exported):
        assert call(f"--checkpoint={checkpoint}", f"--data={tmp_path / 'own.jsonl'}", *form) == 0
        found.append(json.loads(capsys.readouterr().out)["eval/loss"])
    usual = f"--checkpoint={trained}", f"--data={tmp_path / 'usual.jsonl'}", "--format=pairs", "--json"
    assert call(*usual) == 0 and json.loads(capsys.readouterr().out)["eval/loss"] == found[0]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    texts = f"--checkpoint={trained}", f"--data={tmp_path / 'own.jsonl'}", "--text_field=q"
    assert call(*texts) == 0 and "eval/loss" in capsys.readouterr().out


def test_a_held_out_text_that_has_changed_is_refused(trained, capsys, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "tokenizer.json").write_text(Chars("abc").to_json())
    assert call(f"--checkpoint={run}") == 4
    assert "has changed since the run, and its tokenizer; give --data" in capsys.readouterr().err


def test_training_text_is_not_held_out_text_after_a_change(tmp_path, capsys):
    text = CORPUS.read_text()[:4000]
    (tmp_path / "text.txt").write_text(text)
    jaxlm.train(tiny(data__source=str(tmp_path / "text.txt"), data__validation="10%", steps=4), tmp_path / "run")
    assert call(f"--checkpoint={tmp_path / 'run'}") == 0
    (tmp_path / "text.txt").write_text(text[:2000])
    assert call(f"--checkpoint={tmp_path / 'run'}") == 4
    assert "the training tokens of data.source=" in (said := capsys.readouterr().err)
    assert "have changed since the run; give --data" in said


def test_a_held_out_text_of_its_own_that_has_changed_is_told(tmp_path, capsys):
    text, own = CORPUS.read_text(), tmp_path / "val.txt"
    own.write_text(text[-400:])
    jaxlm.train(tiny(data__validation=str(own), steps=4), tmp_path / "run")
    assert call(f"--checkpoint={tmp_path / 'run'}") == 0
    assert "changed" not in capsys.readouterr().err
    own.write_text(text[-300:])
    assert call(f"--checkpoint={tmp_path / 'run'}") == 0, "it is held out all the same"
    said = f"warning: the held-out text, data.validation='{own}', is not that of the training: it has changed since\n"
    assert said in capsys.readouterr().err


def test_a_run_may_have_held_out_nothing(trained, capsys, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    described = json.loads((run / "config.json").read_text())
    described["data"]["validation"] = ""
    (run / "config.json").write_text(json.dumps(described))
    assert call(f"--checkpoint={run}") == 2
    assert "the run held out no text; give --data" in capsys.readouterr().err


def test_a_folder_has_no_text_of_its_own(exported, capsys):
    assert call(f"--checkpoint={exported}") == 2
    assert f"{str(exported)!r} is no run, so it has no held-out text of its own; give --data" in capsys.readouterr().err


def test_tokens_of_another_tokenizer_are_refused(trained, capsys, tmp_path):
    other = Chars("abc")
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
