"""Beside lm_eval's own `hf` model on the exported checkpoint: the same requests, the same answers; and local tasks."""

import json
import re
import sys
import types
import warnings
from pathlib import Path

import pytest

from jaxlm import evaluate
from jaxlm.errors import ConfigError, DataError
from jaxlm.evals import harness
from jaxlm.training import load as load_module
from jaxlm.training.export import export
from jaxlm.training.load import load

PAIRS = [
    ("def f(x", "):\n"),
    ("", "import os"),
    ("    return self.", "name"),
    ("ends in a space ", "and goes on"),
    ("a context that is much longer than the sixteen tokens of the model, ", "cut on its left"),
    ("é", "ü€"),
    ("x", "y"),
]
TEXTS = ["class A:\n    pass\n", "x", "a text of several windows, none of which overlaps another one; the end", "   "]
PROMPTS = ["def ", "import ", "a prompt that does not fit into the context with its answer", "    "]
MOST = 6


def requests(arguments):
    return [types.SimpleNamespace(args=one) for one in arguments]


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    return export(trained, tmp_path_factory.mktemp("exported") / "model")


@pytest.fixture(scope="module")
def ours(trained):
    model, params, tokenizer, cfg = load(trained)
    return harness.adapter(model, params, tokenizer, cfg.model.context_length, 3)


@pytest.fixture(scope="module")
def theirs(exported):
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lm_eval, accelerate, peft and transformers
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=str(exported), device="cpu", batch_size=1, dtype="float32")


@pytest.mark.filterwarnings("ignore")  # theirs
def test_loglikelihoods(ours, theirs):
    wanted = theirs.loglikelihood(requests(PAIRS), disable_tqdm=True)
    found = ours.loglikelihood(requests(PAIRS), disable_tqdm=True)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in wanted], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_what_greedy_decoding_gives_is_greedy(ours):
    (text,) = ours.generate_until(requests([("def ", {"max_gen_toks": 3, "until": []})]))
    assert len(text) == 3
    other = text[:-1] + ("x" if text[-1] != "x" else "y")
    found = ours.loglikelihood(requests([("def ", text), ("def ", other)]), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]
    assert found[0][0] > found[1][0]


@pytest.mark.filterwarnings("ignore")  # theirs
def test_rolling_loglikelihoods(ours, theirs):
    wanted = theirs.loglikelihood_rolling(requests([(text,) for text in TEXTS]), disable_tqdm=True)
    found = ours.loglikelihood_rolling(requests([(text,) for text in TEXTS]), disable_tqdm=True)
    assert found == pytest.approx(wanted, abs=1e-3)
    assert ours.loglikelihood_rolling(requests([("",)])) == [0.0]


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("until", [[], ["e"], ["  ", "t"]])
def test_texts(ours, theirs, until):
    asked = requests([(prompt, {"until": until, "max_gen_toks": MOST, "do_sample": False}) for prompt in PROMPTS])
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)


def test_requests_that_ask_differently_are_answered_in_their_order(ours):
    asked = [(prompt, {"until": [], "max_gen_toks": n, "do_sample": False}) for n in (2, 5) for prompt in PROMPTS]
    mixed = asked[::2] + asked[1::2]
    found = dict(zip(map(repr, mixed), ours.generate_until(requests(mixed))))
    for one in asked:
        assert ours.generate_until(requests([one])) == [found[repr(one)]]
        assert len(found[repr(one)]) <= one[1]["max_gen_toks"]


def test_a_text_ends_where_the_context_is_full(ours):
    (text,) = ours.generate_until(requests([("def f", {"until": [], "max_gen_toks": 1000, "do_sample": False})]))
    assert 0 < len(text) <= 15


@pytest.mark.parametrize(("length", "read", "written"), [(9, 9, 7), (15, 15, 1), (16, 8, 8), (50, 8, 8)])
def test_what_is_asked_for_leaves_the_prompt(ours, length, read, written):
    """By default 256 tokens, of a context of 16: the prompt was once cut to its last token."""
    prompt, asked = "abcdefghij" * 5, {"until": [], "do_sample": False}
    (text,) = ours.generate_until(requests([(prompt[-length:], asked)]))
    assert ours.generate_until(requests([(prompt[-read:], asked | {"max_gen_toks": written})])) == [text]
    assert len(text) == written


def test_arguments_of_generation_change_the_text_or_are_refused(ours):
    """All but a few were once left out without a word."""
    asked = {"until": [], "max_gen_toks": 10, "do_sample": False}

    def written(**more):
        return ours.generate_until(requests([("def ", asked | more)]))[0]

    plain = written()
    assert written(num_beams=1, use_cache=True, top_k=None, temperature=0.7) == plain
    assert written(repetition_penalty=1e6) != plain and len(set(written(repetition_penalty=1e6))) == 10
    for name, (value, message) in {
        "num_beams": (4, "by num_beams=4, which would be ignored; known: do_sample, max_gen_toks, repetition_penalty"),
        "min_p": (0.1, "by min_p=0.1, which would be ignored"),
        "temperature": (None, r"by \{.*'temperature': None\}: float\(\) argument must be"),
        "max_gen_toks": ("many", "by .*'many'.*: invalid literal for int"),
        "top_p": (1.5, "top_p is 1.5; expected above 0 and at most 1"),
    }.items():
        with pytest.raises(ConfigError, match=message):
            written(**{name: value})


def test_a_continuation_longer_than_the_context_is_an_error(ours):
    with pytest.raises(DataError, match="a continuation of 17 tokens is longer than the context of 16"):
        ours.loglikelihood(requests([("x", "y" * 17)]), disable_tqdm=True)


# Tasks

DOCUMENTS = [
    {"text": "def f(x):", "choices": ["\n", "zzz"], "label": 0, "answer": "x"},
    {"text": "import", "choices": [" os", "@@@@"], "label": 0, "answer": "y"},
    {"text": "return", "choices": ["QQ", " x"], "label": 1, "answer": "z"},
]
TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "local_likelihood": """
output_type: loglikelihood
doc_to_text: text
doc_to_target: answer
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "local_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "local_text": """
output_type: generate_until
doc_to_text: text
doc_to_target: answer
generation_kwargs: {until: ["e"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Paths of tasks over a local file, one of each type of request."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, text in TASKS.items():
        data = (
            f"dataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {{test: {folder}/documents.jsonl}}}}"
        )
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}\n{text}")
    return [str(folder / f"{name}.yaml") for name in TASKS]


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.mark.filterwarnings("ignore")  # of lm_eval and datasets
def test_tasks_on_local_files(trained, ours, theirs, tasks, capsys):
    import lm_eval
    from lm_eval.tasks import TaskManager

    known = TaskManager(include_defaults=False)
    wanted = lm_eval.simple_evaluate(
        model=theirs, tasks=tasks, task_manager=known, bootstrap_iters=0, log_samples=False, torch_random_seed=None
    )["results"]
    assert evaluate.main([f"--checkpoint={trained}", "--json", *(f"--harness={task}" for task in tasks)]) == 0
    found = json.loads(capsys.readouterr().out)
    for name, metric in (
        *(("local_choice", metric) for metric in ("acc", "acc_norm")),
        *(("local_likelihood", metric) for metric in ("perplexity", "acc")),
        *(("local_rolling", metric) for metric in ("word_perplexity", "bits_per_byte")),
        ("local_text", "exact_match"),
    ):
        assert found[f"eval/{name}/{metric}"] == pytest.approx(wanted[name][f"{metric},none"], rel=1e-3), name
    low, high = found["intervals"]["eval/local_choice/acc"]
    assert low <= found["eval/local_choice/acc"] <= high
    assert "eval/loss" not in found and found["details"]["harness"]["n-samples"]["local_text"]["original"] == 3


@pytest.mark.filterwarnings("ignore")  # of lm_eval and datasets
def test_text_and_tasks_of_the_harness_together(trained, tasks, capsys):
    flags = [f"--harness={tasks[0]}", "--limit=2", "--num_fewshot=0", f"--data={__file__}"]
    assert evaluate.main([f"--checkpoint={trained}", *flags]) == 0
    printed = capsys.readouterr().out
    assert "eval/local_choice/acc " in printed and "eval/bits_per_byte" in printed


# What can't be


@pytest.mark.slow
def test_no_such_task_names_the_nearest(trained, capsys):
    assert evaluate.main([f"--checkpoint={trained}", "--harness=hellaswog"]) == 2
    assert "the harness has no task 'hellaswog': did you mean 'hellaswag'?" in capsys.readouterr().err
    assert evaluate.main([f"--checkpoint={trained}", "--harness=zzzzzzzz"]) == 2
    assert re.search(r"has no task 'zzzzzzzz': `lm_eval ls tasks` lists its [\d,]+\n$", capsys.readouterr().err)


@pytest.mark.filterwarnings("ignore")  # of lm_eval and datasets
def test_a_task_that_asks_for_beams(trained, tasks, tmp_path, capsys):
    text = Path(tasks[-1]).read_text()
    (path := tmp_path / "beams.yaml").write_text(text.replace("do_sample: false", "do_sample: false, num_beams: 4"))
    assert evaluate.main([f"--checkpoint={trained}", f"--harness={path}"]) == 2
    assert "error: the harness asks for a text by num_beams=4, which would be ignored" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # of lm_eval and datasets
def test_a_task_whose_data_is_gone(trained, tasks, tmp_path, capsys):
    path = tmp_path / "gone.yaml"
    data = "dataset_path: json\ndataset_kwargs: {data_files: {test: gone.jsonl}}\ntest_split: test"
    path.write_text(f"task: gone\n{data}\n{TASKS['local_choice']}")
    assert evaluate.main([f"--checkpoint={trained}", f"--harness={path}"]) == 4
    assert "gone.yaml: FileNotFoundError" in capsys.readouterr().err


def test_without_the_library(ours, trained, monkeypatch):
    model, params, tokenizer, _ = load(trained)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    for needs in (lambda: harness.adapter(model, params, tokenizer, 16, 1), lambda: harness.find(["x"])):
        with pytest.raises(ConfigError, match="pip install 'jaxlm\\[harness\\]'"):
            needs()


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ("--harness=nowhere.yaml", 4, "error: --harness=nowhere.yaml: there is no such file\n"),
        ("--harness=x.yaml --limit=0", 2, "error: --limit is 0; expected at least 1\n"),
        pytest.param("--harness=hellaswog", 2, "did you mean 'hellaswag'?", marks=pytest.mark.slow),
    ],
)
def test_what_the_harness_cannot_do_is_known_before_anything_is_read(trained, monkeypatch, capsys, flags, code, said):
    """It was once said after the text was evaluated and the tasks answered."""
    monkeypatch.setattr(load_module, "load", lambda *_: pytest.fail("loaded"))
    assert evaluate.main([f"--checkpoint={trained}", f"--data={__file__}", *flags.split()]) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value", "least"), [("limit", 0, 1), ("limit", -1, 1), ("num_fewshot", -1, 0)])
def test_numbers_that_make_no_sense(trained, capsys, name, value, least):
    assert evaluate.main([f"--checkpoint={trained}", "--harness=x.yaml", f"--{name}={value}"]) == 2
    assert capsys.readouterr().err == f"error: --{name} is {value}; expected at least {least}\n"
