"""Evaluations by name: on the pairs of a split, but for `perplexity`. A function in this module that is given a
`Subject` is one, as is a user's own `package.module:function`; see `asking.find`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data import TokenFile, Tokenizer, examples
from jaxlm.errors import DataError
from jaxlm.evals import generation, likelihoods, scores  # not their functions: a function in this module is a task
from jaxlm.evals.generation import Request
from jaxlm.evals.scores import Score
from jaxlm.model.gpt2 import Model, PyTree
from jaxlm.telemetry import text as plain

MOST_LABELS = 100
CHOICES = 4
SHOWN = 5  # wrong answers
SPARE = 8
"""Tokens that `generate` lets an answer have beyond its completion, where the context takes them: what is longer is
wrong anyway."""


class Subject(NamedTuple):
    """What an evaluation is given."""

    model: Model
    params: PyTree  # None where it is to be seen only whether it can be asked: see `asking.check`
    tokenizer: Tokenizer
    split: TokenFile
    context_length: int
    batch_size: int  # rows at once; of `generate`, at most `decode.ROWS`
    progress: bool = False  # show a bar on stderr
    too_long: str = "error"  # `data.too_long`: unless "error", pairs whose completion fills the context are left out
    chunks: int = 1  # of the context, whose logits are in memory at a time: `model.loss_chunks`


class Result(NamedTuple):
    metrics: dict[str, float]  # by names that follow "eval/": TASK/METRIC, so that they meet no others
    intervals: dict[str, tuple[float, float]]  # 95%, of the same names, where there is one
    details: Any = None  # JSON: all that was found, item by item where that makes sense
    text: str = ""  # what of it is worth a look, in lines


# What tasks make of pairs, before they need a model.

Pair = tuple[np.ndarray, np.ndarray]


def _pairs(subject: Subject) -> list[Pair]:
    """(prompt, completion) of the pairs, as ids, without those that `too_long` leaves out: how many is said on stderr,
    where there are parameters.

    Raises:
      DataError: none is left, or one is too long where that is an error.
    """
    pairs = examples.pairs(subject.tokenizer, subject.split)
    if subject.too_long == "error":
        for _, completion in pairs:
            likelihoods.room(completion, subject.context_length)
        return pairs
    kept = [(prompt, completion) for prompt, completion in pairs if len(completion) < subject.context_length]
    if len(kept) < len(pairs):
        said = f"{len(pairs) - len(kept):,} of {len(pairs):,} pairs have a completion that fills the context"
        if not kept:
            raise DataError(f"{said} of {subject.context_length:,} tokens; none is left to ask for")
        if subject.params is not None:
            print(f"{said} of {subject.context_length:,} tokens: left out of tasks", file=sys.stderr)
    return kept


def _labelled(subject: Subject) -> tuple[list[Pair], list[str], list[str]]:
    """The pairs, the label of each, and all labels.

    Raises:
      DataError: as `_pairs`; or there are too few labels, or too many.
    """
    pairs = _pairs(subject)
    texts = [subject.tokenizer.decode(completion) for _, completion in pairs]
    labels = sorted(set(texts))
    if len(labels) == 1:
        raise DataError(f"all {len(pairs)} completions are {labels[0]!r}; one class tells nothing")
    if len(labels) > MOST_LABELS:
        raise DataError(
            f"{len(labels)} different completions, and at most {MOST_LABELS} are taken for labels; "
            "the task 'generate' compares what is written"
        )
    return pairs, texts, labels


def _choosable(subject: Subject) -> tuple[list[Pair], list[str], dict[str, np.ndarray]]:
    """The pairs, the text of each completion, and the ids of all texts.

    Raises:
      DataError: as `_pairs`; or there are too few to choose among.
    """
    pairs = _pairs(subject)
    texts = [subject.tokenizer.decode(completion) for _, completion in pairs]
    known = {text: completion for text, (_, completion) in zip(texts, pairs, strict=True)}
    if len(known) < CHOICES:
        raise DataError(f"{len(known)} different completions; expected at least {CHOICES}, to choose among")
    return pairs, texts, known


Task = Callable[[Subject], Result]


def _of(made: Callable[[Subject], Any]) -> Callable[[Task], Task]:
    """Of a task on pairs: its attribute `of_pairs` is what it makes of them, which `asking.check` tries before anything
    is computed."""

    def mark(task: Task) -> Task:
        vars(task)["of_pairs"] = made
        return task

    return mark


# The tasks


def perplexity(subject: Subject) -> Result:
    """Loss, perplexity, bits per byte and accuracy. They are told of every split, so the name adds nothing to them: see
    `evals.perplexity`."""
    return Result({}, {})


@_of(_pairs)
def generate(subject: Subject) -> Result:
    """Greedy answers: exact_match, f1 (SQuAD's), and by sacrebleu bleu and chrf, where it is installed. A prompt that
    leaves no room for its own completion is cut on the left."""
    tokenizer, pairs = subject.tokenizer, _pairs(subject)
    prompts = [
        _fitted(ids.tolist() or [tokenizer.end_of_text], completion, subject.context_length)
        for ids, completion in pairs
    ]
    longest = max(len(completion) for _, completion in pairs)
    written = generation.continued(
        subject.model,
        subject.params,
        tokenizer,
        prompts,
        [0] * len(pairs),
        Request(max_tokens=longest + SPARE, temperature=0.0, beyond="stop"),
        subject.context_length,
        progress=subject.progress,
        rows=subject.batch_size,
    )
    answers = [one.text for one in written]
    references = [tokenizer.decode(completion) for _, completion in pairs]
    found = {
        "exact_match": scores.mean(list(map(scores.exact_match, answers, references))),
        "f1": scores.mean(list(map(scores.token_f1, answers, references))),
    }
    try:
        found |= scores.corpus(answers, references)
    except ImportError:
        print("generate: no bleu and chrf, which need sacrebleu: pip install 'jaxlm[tasks]'", file=sys.stderr)
    details = [
        {"prompt": tokenizer.decode(ids), "answer": answer, "reference": reference}
        for (ids, _), answer, reference in zip(pairs, answers, references, strict=True)
    ]
    wrong = [item for item in details if not scores.exact_match(item["answer"], item["reference"])]
    lines = [f"{item['prompt']!r}: {item['answer']!r}, expected {item['reference']!r}\n" for item in wrong[:SHOWN]]
    text = f"\n{len(wrong):,} of {len(pairs):,} answers are not the reference\n" + "".join(lines) if wrong else ""
    return _result("generate", found, details, text)


@_of(_labelled)
def classify(subject: Subject) -> Result:
    """The most probable label, end of text included: accuracy, macro_f1; the confusion matrix is in the details."""
    return _classified("classify", subject, by_length=False)


@_of(_labelled)
def classify_by_length(subject: Subject) -> Result:
    """As `classify`, by the log-likelihood over the number of the label's tokens."""
    return _classified("classify_by_length", subject, by_length=True)


@_of(_choosable)
def choice(subject: Subject) -> Result:
    """The completion among 4, the others being those of other pairs, that is most probable (accuracy) or most probable
    by its number of tokens (accuracy_by_length). Chance is a quarter."""
    pairs, texts, known = _choosable(subject)
    rng, all_of_them = np.random.default_rng(0), list(known)
    right = rng.integers(CHOICES, size=len(pairs))  # where it stands: the first of equals is taken
    rows = []
    for (prompt, _), text, place in zip(pairs, texts, right.tolist(), strict=True):
        drawn = [all_of_them[i] for i in rng.choice(len(all_of_them), CHOICES, replace=False)]
        offered = [other for other in drawn if other != text][: CHOICES - 1]
        offered.insert(place, text)
        rows += [(prompt, known[one]) for one in offered]
    found = _likelihoods(subject, rows).reshape(len(pairs), CHOICES)
    lengths = np.array([len(completion) + 1 for _, completion in rows]).reshape(found.shape)
    return _result(
        "choice",
        {
            "accuracy": scores.mean(found.argmax(1) == right),
            "accuracy_by_length": scores.mean((found / lengths).argmax(1) == right),
        },
        None,
        "",
    )


def _fitted(prompt: list[int], completion: np.ndarray, context_length: int) -> list[int]:
    """All of a prompt that leaves room for its completion in the context, the end of one that doesn't: that much is
    also read in training, and as it is cut anyway, room for `SPARE` tokens more."""
    room = min(likelihoods.room(completion, context_length), context_length - 1)  # of a full context half is read
    return prompt if len(prompt) <= room else prompt[-max(1, room - SPARE) :]


def _likelihoods(subject: Subject, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """float64[rows] of (prompt, completion): see `likelihoods.of_completions`."""
    return likelihoods.of_completions(
        subject.model,
        subject.params,
        subject.tokenizer.end_of_text,
        rows,
        subject.context_length,
        subject.batch_size,
        progress=subject.progress,
        chunks=subject.chunks,
    )


def _classified(name: str, subject: Subject, by_length: bool) -> Result:
    pairs, texts, labels = _labelled(subject)
    ids = {text: completion for text, (_, completion) in zip(texts, pairs, strict=True)}
    rows = [(prompt, ids[label]) for prompt, _ in pairs for label in labels]
    found = _likelihoods(subject, rows).reshape(len(pairs), len(labels))
    if by_length:
        found = found / np.array([len(ids[label]) + 1 for label in labels])
    predicted, wanted = found.argmax(1), np.array([labels.index(text) for text in texts])
    counts = scores.confusion(predicted, wanted, len(labels))
    return _result(
        name,
        {"accuracy": scores.mean(predicted == wanted), "macro_f1": scores.macro_f1(predicted, wanted)},
        {"labels": labels, "confusion": counts.tolist()},
        _table(labels, counts),
    )


def _table(labels: Sequence[str], counts: np.ndarray) -> str:
    """The confusion matrix in lines: a row for each label that was wanted."""
    rows = [["predicted:", *map(repr, labels)]]
    rows += [[repr(label), *map(str, row)] for label, row in zip(labels, counts, strict=True)]
    return "\n" + "\n".join(plain.aligned(rows, right=range(1, len(rows)))) + "\n"


def _result(name: str, found: dict[str, Score], details: Any, text: str) -> Result:
    metrics = {f"{name}/{key}": score.value for key, score in found.items()}
    return Result(metrics, {f"{name}/{key}": (score.low, score.high) for key, score in found.items()}, details, text)
