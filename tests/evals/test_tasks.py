"""Evaluations by name, on models whose answers are known, and through the doors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import data, evaluate
from jaxlm.data import examples
from jaxlm.errors import ConfigError, DataError
from jaxlm.evals import asking, generation, likelihoods, tasks
from jaxlm.model import decode, gpt2
from tests.runs import checkpoints, rows
from tests.tiny import assert_same_bits, resolved, tiny

T = 32
FIELDS = {"data__format": "pairs", "model__context_length": T, "data__validation": ""}


@pytest.fixture
def subject(tmp_path):
    """`subject(pairs, params=None)`: of a small model, or one that gives every token what `logits` says."""

    def make(pairs, model=None):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
        opened = data.open(tiny(data__source=str(path), **FIELDS).data)
        built = gpt2.build(resolved(model__context_length=T).model)
        params = built.init(jax.random.key(0))
        return tasks.Subject(model or built, params, opened.tokenizer, opened.train, T, batch_size=4)

    return make


REVIEWS = [("good film:", "pos"), ("bad film:", "neg"), ("fine:", "pos"), ("dull book:", "neg"), ("great:", "pos")]


def log_likelihoods(subject, pairs):
    return likelihoods.of_completions(*subject[:2], subject.tokenizer.end_of_text, pairs, T, subject.batch_size)


def by_hand(subject, prompt, completion):
    """The log-likelihood of one completion, from the logits of one unpadded row."""
    end = subject.tokenizer.end_of_text
    ids = [*(list(prompt.encode()) or [end]), *completion.encode(), end]
    logits = subject.model.apply(subject.params, {"inputs": jnp.array([ids[:-1]])})
    found = np.asarray(jax.nn.log_softmax(logits))[0, np.arange(len(ids) - 1), ids[1:]]
    return found[-len(completion.encode()) - 1 :].sum()


def test_log_likelihoods_by_hand(subject):
    asked = subject([*REVIEWS, ("", "alone"), ("p", "a long completion")])
    found = log_likelihoods(asked, examples.pairs(asked.tokenizer, asked.split))
    expected = [by_hand(asked, *pair) for pair in [*REVIEWS, ("", "alone"), ("p", "a long completion")]]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_long_prompt_is_cut_and_a_long_completion_an_error(subject):
    asked = subject([("x" * 50 + "tail:", "yes"), ("tail:", "no")])
    (prompt, completion), _ = examples.pairs(asked.tokenizer, asked.split)
    found = log_likelihoods(asked, [(prompt, completion)])
    np.testing.assert_allclose(found, by_hand(asked, ("x" * 50 + "tail:")[-(T - 3) :], "yes"), rtol=1e-5)
    with pytest.raises(DataError, match="a completion of 40 tokens fills the context of 32"):
        log_likelihoods(asked, [(prompt, np.full(40, 65))])


def rigged(answer):
    """A model that follows each token by what `answer` has for it, with near certainty."""
    table = np.full((257, 257), -20.0, np.float32)
    for token, following in answer.items():
        table[token, following] = 20.0
    built = gpt2.build(resolved(model__context_length=T).model)
    return built._replace(
        hidden=lambda params, batch: jnp.asarray(table)[batch["inputs"]],
        logits=lambda params, hidden: hidden,
        unstack=lambda params: params,
        prefill=lambda params, tokens, start, slots: (
            jnp.asarray(table)[tokens[:, -1]],
            gpt2.Cache((), start, jnp.int32(tokens.shape[1])),
        ),
        decode=lambda params, token, cache: (jnp.asarray(table)[token], cache._replace(length=cache.length + 1)),
    )


def test_classify_takes_the_most_probable_label(subject):
    yes = rigged({ord(":"): ord("p"), ord("p"): ord("o"), ord("o"): ord("s"), ord("s"): 256})
    found = tasks.classify(subject(REVIEWS, yes))
    assert found.metrics == {"classify/accuracy": 0.6, "classify/macro_f1": pytest.approx((0 + 0.75) / 2)}
    assert found.details == {"labels": ["neg", "pos"], "confusion": [[0, 2], [0, 3]]}
    low, high = found.intervals["classify/accuracy"]
    assert 0 <= low < 0.6 < high <= 1
    assert found.text.splitlines()[1:] == [
        "predicted:  'neg'  'pos'",
        "'neg'           0      2",
        "'pos'           0      3",
    ]


def test_labels_may_begin_alike_and_be_each_others_beginning(subject):
    one = rigged({ord(":"): ord("a"), ord("a"): ord("b"), ord("b"): 256})
    found = tasks.classify(subject([("x:", "ab"), ("y:", "abc"), ("z:", "a")], one))
    assert found.metrics["classify/accuracy"] == pytest.approx(1 / 3)
    assert found.details["confusion"] == [[0, 1, 0], [0, 1, 0], [0, 1, 0]]


def test_length_counts_where_it_is_asked_for(subject):
    """Every token costs the same: the shorter label is the more probable, a token of either is not."""
    same = rigged({})
    pairs = [("x:", "no"), ("y:", "no"), ("z:", "perhaps")]
    assert tasks.classify(subject(pairs, same)).details["confusion"] == [[2, 0], [1, 0]]
    asked = subject(pairs, same)
    likelihoods = log_likelihoods(asked, examples.pairs(asked.tokenizer, asked.split))
    assert likelihoods[0] / 3 == pytest.approx(likelihoods[2] / 8)
    assert set(tasks.classify_by_length(asked).metrics) == {
        "classify_by_length/accuracy",
        "classify_by_length/macro_f1",
    }


def test_what_has_no_classes(subject):
    with pytest.raises(DataError, match="all 2 completions are 'yes'; one class tells nothing"):
        tasks.classify(subject([("a", "yes"), ("b", "yes")]))
    with pytest.raises(DataError, match="101 different completions, and at most 100 are taken for labels"):
        tasks.classify(subject([("a", f"{i}") for i in range(101)]))


def test_choice_is_among_the_completions_of_others(subject):
    undecided = tasks.choice(subject([(f"{c}:", c * 2) for c in "abcdef"] * 20, rigged({}))).metrics
    assert 0.1 < undecided["choice/accuracy"] == undecided["choice/accuracy_by_length"] < 0.4
    knows = rigged({ord(":"): ord("a"), ord("a"): ord("a")})
    found = tasks.choice(subject([("x:", "aa"), *[("y:", c * 2) for c in "bcdef"]], knows))
    assert 1 / 6 <= found.metrics["choice/accuracy"] < 1 / 2
    lengths = [("x:", "a"), ("x:", "bbbb"), ("x:", "cccccc"), ("x:", "dddddddd")]
    assert tasks.choice(subject(lengths, rigged({}))).metrics["choice/accuracy"] == 0.25
    with pytest.raises(DataError, match="3 different completions; expected at least 4"):
        tasks.choice(subject(lengths[:3], rigged({})))


@pytest.mark.slow
def test_a_trained_choice_is_right(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{i % 6}:", "completion": "abcdef"[i % 6] * 3}) + "\n" for i in range(60))
    )
    fields = FIELDS | {"data__validation": str(path), "data__source": str(path), "steps": 150, "eval__every": 150}
    cfg = tiny(**fields, eval__tasks=("choice",), optimizer__scale_by_learning_rate__peak=0.02, data__batch_size=16)
    assert jaxlm.train(cfg, tmp_path / "run").metrics["eval/choice/accuracy"] == 1.0


def test_generate_compares_what_is_written(subject, capsys):
    counts = rigged({ord(":"): ord("1"), ord("1"): ord("2"), ord("2"): 256})
    found = tasks.generate(subject([("a:", "12"), ("b:", "13"), ("", "12"), ("c:", "12")], counts))
    assert found.metrics["generate/exact_match"] == found.metrics["generate/f1"] == 0.5
    assert [item["answer"] for item in found.details][:2] == ["12", "12"]
    assert {"generate/bleu", "generate/chrf"} <= set(found.metrics)
    assert found.text.splitlines()[1:3] == ["2 of 4 answers are not the reference", "'b:': '12', expected '13'"]


def test_no_more_prompts_are_answered_at_once_than_are_asked_for(subject):
    """Where memory was short, --batch_size was named, and changed nothing."""
    counts = rigged({ord(":"): ord("1"), ord("1"): 256})
    seen, prefill = set(), counts.prefill

    def counted(params, tokens, start, slots):
        seen.add(tokens.shape[0])
        return prefill(params, tokens, start, slots)

    asked = subject([(f"{i}:", "1") for i in range(40)], counts._replace(prefill=counted))
    for most, found in ((3, 2), (1000, decode.ROWS)):
        assert tasks.generate(asked._replace(batch_size=most)).metrics["generate/exact_match"] == 1.0
        assert max(seen) == found  # a power of two


def test_one_long_completion_cuts_no_other_prompt(subject, monkeypatch):
    asked, given = subject([("question one:", "yes"), ("q" * T + "two:", "no"), ("three:", "ab" * 10)]), []

    def continued(model, params, tokenizer, prompts, *_, **__):
        given.extend(map(tokenizer.decode, prompts))
        return [generation.Continuation("", [], [], "length")] * len(prompts)

    monkeypatch.setattr(generation, "continued", continued)
    tasks.generate(asked)
    assert given == ["question one:", "q" * (T - 2 - tasks.SPARE - 4) + "two:", "three:"]
    with pytest.raises(DataError, match="a completion of 32 tokens fills the context of 32"):
        tasks.generate(subject([("a:", "b"), ("c:", "d" * T)]))


def test_a_prompt_that_fits_is_read_whole_and_its_answer_can_be_given(subject, monkeypatch):
    """Eight tokens were once taken off every prompt, those for an answer that is too long."""
    read, continued = [], generation.continued

    def seen(model, params, tokenizer, prompts, *rest, **more):
        read.extend(map(len, prompts))
        return continued(model, params, tokenizer, prompts, *rest, **more)

    monkeypatch.setattr(generation, "continued", seen)
    counts = rigged({ord("?"): ord("1"), ord("1"): ord("2"), ord("2"): 256, ord("!"): ord("!")})
    lengths = [T - 10, T - 3, T - 2]
    found = tasks.generate(subject([("p" * (n - 1) + "?", "12") for n in lengths], counts))
    assert read == lengths and found.metrics["generate/exact_match"] == 1.0
    cut = tasks.generate(subject([("p" * T + "?", "12"), ("p" * (T - 5) + "!", "!!")], counts))
    assert read[3:] == [T - 2 - tasks.SPARE, T - 4] and cut.metrics["generate/exact_match"] == 0.5


@pytest.mark.parametrize("task", [tasks.generate, tasks.classify, tasks.classify_by_length, tasks.choice])
def test_a_completion_that_fills_the_context_is_left_out_where_that_is_no_error(subject, task, capsys):
    pairs = [(f"{c}:", c * 2) for c in "abcd"]
    long = [("x:", "y" * T)]
    for too_long in ("cut", "drop"):
        assert task(subject(pairs + long)._replace(too_long=too_long)).metrics == task(subject(pairs)).metrics
        assert "1 of 5 pairs have a completion that fills the context of 32 tokens: left out" in capsys.readouterr().err
    with pytest.raises(DataError, match="1 of 1 pairs have a completion .* none is left to ask for"):
        task(subject(long)._replace(too_long="cut"))
    with pytest.raises(DataError, match="a completion of 32 tokens fills the context of 32"):
        task(subject(pairs + long))


def test_one_long_pair_ends_neither_training_nor_evaluation_with_tasks(tmp_path):
    path = tmp_path / "pairs.jsonl"
    pairs = [*REVIEWS, ("long:", "x" * T)]
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    fields = FIELDS | {"data__validation": str(path), "data__source": str(path), "steps": 4}
    run = jaxlm.train(tiny(**fields, eval__tasks=("classify",)), tmp_path / "run")
    assert "eval/classify/accuracy" in run.metrics
    assert evaluate.main([f"--checkpoint={tmp_path / 'run'}", "--task=classify"]) == 0


def test_names_of_tasks(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="unknown task 'generat': did you mean 'generate'"):
        asking.find("generat")
    (tmp_path / "mine.py").write_text(
        "def size(subject):\n    return {'size': subject.context_length}\ndef bad(s): 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    blank = tasks.Subject(None, None, None, None, 7, 1)
    assert asking.find("mine:size")(blank) == tasks.Result({"size": 7.0}, {})
    with pytest.raises(ConfigError, match="task 'mine:bad' returned NoneType; expected a dict of numbers, or a Result"):
        asking.find("mine:bad")(blank)
    with pytest.raises(ConfigError, match="'mine' has no function 'siz'"):
        asking.find("mine:siz")


def test_perplexity_is_the_name_of_what_is_always_told(trained, tmp_path, capsys):
    found = []
    for flags in ([], ["--task=perplexity"]):
        assert evaluate.main([f"--checkpoint={trained}", "--json", *flags]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[1] == found[0] | {"intervals": {}, "details": {"perplexity": None}} and "eval/perplexity" in found[0]
    assert evaluate.main([f"--checkpoint={trained}", "--task=perplexity"]) == 0
    assert "eval/bits_per_byte" in capsys.readouterr().out
    metrics = [
        jaxlm.train(tiny(eval__tasks=names), tmp_path / f"{len(names)}").metrics for names in ((), ("perplexity",))
    ]
    assert metrics[0]["eval/perplexity"] == metrics[1]["eval/perplexity"]


@pytest.mark.slow
def test_tasks_in_training_and_afterwards(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{p}{i} ", "completion": c} for i in range(20) for p, c in REVIEWS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = FIELDS | {"data__validation": "20%", "data__source": str(path), "steps": 40, "eval__every": 20}
    best = {"checkpoint__best": "-eval/classify/accuracy", "eval__tasks": ("classify", "generate")}
    cfg = tiny(**fields, **best, optimizer__scale_by_learning_rate__peak=0.01, data__batch_size=16)
    run = jaxlm.train(cfg, tmp_path / "run")
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = {row["step"]: row["eval/classify/accuracy"] for row in written if "eval/classify/accuracy" in row}
    assert set(told) == {20, 40} and told[40] == run.metrics["eval/classify/accuracy"]
    from jaxlm.training.load import locate

    manifests = {
        p.parent.name: json.loads(p.read_text())["metric"] for p in tmp_path.glob("run/checkpoints/*/manifest.json")
    }
    assert manifests["40"] == -told[40]
    assert locate(str(tmp_path / "run")).step == 40
    arguments = [f"--checkpoint={tmp_path / 'run'}", "--task=classify", "--task=generate"]
    assert evaluate.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["eval/classify/accuracy"] == pytest.approx(told[40])
    assert found["intervals"]["eval/classify/accuracy"][0] <= told[40] and found["details"]["generate"]
    assert evaluate.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "eval/classify/accuracy" in shown and "predicted:" in shown and "  [" in shown
    assert evaluate.main([arguments[0], "--task=clasify"]) == 2


def test_in_training_as_many_rows_are_scored_at_once_as_are_trained_on(subject):
    cfg = resolved(data__batch_size=12, data__micro_batches=4)
    assert asking.subject(cfg, *subject(REVIEWS)[2:4]).batch_size == 3


def test_tasks_of_running_text(tmp_path):
    with pytest.raises(ConfigError, match=r"eval.tasks=\('perplexity',\) needs data.validation and eval.every"):
        jaxlm.train(tiny(eval__tasks=("perplexity",), data__validation=""), tmp_path / "a")
    message = "'generate' compares completions of prompts, and data.format of the config is 'text'; expected .*='pairs'"
    with pytest.raises(ConfigError, match=message):
        jaxlm.train(tiny(eval__tasks=("generate",), data__source="nowhere"), tmp_path / "b")
    opened = data.open(tiny().data)
    with pytest.raises(DataError, match="holds no pairs of prompt and completion"):
        examples.pairs(opened.tokenizer, opened.train)


@pytest.mark.parametrize(
    ("task", "completions", "message"),
    [
        ("classify", ["yes"] * 20, "task 'classify': all 20 completions are 'yes'; one class tells nothing"),
        ("classify_by_length", [f"{i}" for i in range(101)], "task 'classify_by_length': 101 different completions"),
        ("choice", ["a", "b", "c"], "task 'choice': 3 different completions; expected at least 4"),
        ("generate", ["a" * T], "task 'generate': 1 of 1 pairs have a completion that fills the context of 32"),
    ],
)
def test_what_cannot_be_asked_is_known_before_the_first_step(tmp_path, task, completions, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}:", "completion": c}) + "\n" for i, c in enumerate(completions)))
    fields = FIELDS | {"data__validation": str(path), "eval__tasks": (task,)}
    (source := tmp_path / "source.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    with pytest.raises(DataError, match=message):
        jaxlm.train(tiny(data__source=str(source), **fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_task_that_fails_loses_no_save_that_is_due(tmp_path, monkeypatch):
    (tmp_path / "booming.py").write_text("def it(s):\n    raise ValueError('a bug of mine')\n")
    monkeypatch.syspath_prepend(tmp_path)
    fields = {"eval__tasks": ("booming:it",), "eval__every": 4, "checkpoint__every": 2}
    with pytest.raises(ConfigError, match="task 'booming:it': .*booming.py, line 2: ValueError: a bug of mine"):
        jaxlm.train(tiny(**fields), tmp_path / "run")
    assert checkpoints(tmp_path / "run") == [2, 4]
    assert [row["step"] for row in rows(tmp_path / "run") if "eval/loss" in row] == [4]
    again = jaxlm.train(tiny(), tmp_path / "run")
    assert_same_bits(again.state, jaxlm.train(tiny(), tmp_path / "undisturbed").state)


@pytest.mark.parametrize(
    ("task", "best", "said"),
    [("bug", "eval/loss", "ValueError: a bug of mine"), ("fine", "eval/none", "no evaluation gives that")],
)
def test_an_evaluation_that_fails_loses_no_steps(tmp_path, monkeypatch, task, best, said):
    code = "def bug(s):\n    raise ValueError('a bug of mine')\ndef fine(s):\n    return {'score': 1}\n"
    (tmp_path / "unsaved.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    fields = {"eval__tasks": (f"unsaved:{task}",), "eval__every": 4, "checkpoint__every": 100, "checkpoint__best": best}
    with pytest.raises(ConfigError, match=said):
        jaxlm.train(tiny(**fields), tmp_path / "run")
    assert checkpoints(tmp_path / "run") == [4]


def test_a_function_that_is_no_task_is_named(subject):
    for name, error, said in (
        ("os:getcwd", ConfigError, r"task 'os:getcwd' is called with \(subject\): too many positional"),
        ("builtins:int", ConfigError, "task 'builtins:int': TypeError: "),
        ("os:listdir", ConfigError, "task 'os:listdir': TypeError: "),
    ):
        with pytest.raises(error, match=said):
            asking.find(name)(subject(REVIEWS))
