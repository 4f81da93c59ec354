"""Evaluations by name: on the pairs of a split, but for `perplexity`. A function in this module that is given a
`Subject` is one, as is a user's own `package.module:function`; see `asking.find`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
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
"""Tokens that `generate` lets an answer have beyond its completion: what is longer is wrong anyway."""


class Subject(NamedTuple):
    """What an evaluation is given."""

    model: Model
    params: PyTree
    tokenizer: Tokenizer
    split: TokenFile
    context_length: int
    batch_size: int  # rows at once, of those that are scored; `generate` has its own number
    progress: bool = False  # show a bar on stderr
    too_long: str = "error"  # `data.too_long`: unless "error", pairs whose completion fills the context are left out


class Result(NamedTuple):
    metrics: dict[str, float]  # by names that follow "eval/": TASK/METRIC, so that they meet no others
    intervals: dict[str, tuple[float, float]]  # 95%, of the same names, where there is one
    details: Any = None  # JSON: all that was found, item by item where that makes sense
    text: str = ""  # what of it is worth a look, in lines


def perplexity(subject: Subject) -> Result:
    """Loss, perplexity, bits per byte and accuracy. They are told of every split, so the name adds nothing to them: see
    `evals.perplexity`."""
    return Result({}, {})


def generate(subject: Subject) -> Result:
    """Greedy answers: exact_match, f1 (SQuAD's), and by sacrebleu bleu and chrf, where it is installed. A prompt that
    leaves no room for its own completion is cut on the left."""
    tokenizer, pairs = subject.tokenizer, _pairs(subject)
    rooms = [max(1, likelihoods.room(completion, subject.context_length) - SPARE) for _, completion in pairs]
    prompts = [(ids.tolist() or [tokenizer.end_of_text])[-room:] for (ids, _), room in zip(pairs, rooms, strict=True)]
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


def classify(subject: Subject) -> Result:
    """The most probable label, end of text included: accuracy, macro_f1; the confusion matrix is in the details."""
    return _classified("classify", subject, by_length=False)


def classify_by_length(subject: Subject) -> Result:
    """As `classify`, by the log-likelihood over the number of the label's tokens."""
    return _classified("classify_by_length", subject, by_length=True)


def choice(subject: Subject) -> Result:
    """The completion among 4, the others being those of other pairs, that is most probable (accuracy) or most probable
    by its number of tokens (accuracy_by_length). Chance is a quarter."""
    tokenizer, pairs = subject.tokenizer, _pairs(subject)
    texts = [tokenizer.decode(completion) for _, completion in pairs]
    known = {text: completion for text, (_, completion) in zip(texts, pairs, strict=True)}
    if len(known) < CHOICES:
        raise DataError(f"choice: {len(known)} different completions; expected at least {CHOICES}, to choose among")
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


def _pairs(subject: Subject) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt, completion) of the pairs, as ids, without those that `too_long` leaves out: how many is said on stderr.

    Raises:
      DataError: none is left.
    """
    pairs = examples.pairs(subject.tokenizer, subject.split)
    if subject.too_long == "error":
        return pairs
    kept = [(prompt, completion) for prompt, completion in pairs if len(completion) < subject.context_length]
    if len(kept) < len(pairs):
        said = f"{len(pairs) - len(kept):,} of {len(pairs):,} pairs have a completion that fills the context"
        if not kept:
            raise DataError(f"{said} of {subject.context_length:,} tokens; none is left to ask for")
        print(f"{said} of {subject.context_length:,} tokens: left out of tasks", file=sys.stderr)
    return kept


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
    )


def _classified(name: str, subject: Subject, by_length: bool) -> Result:
    tokenizer, pairs = subject.tokenizer, _pairs(subject)
    texts = [tokenizer.decode(completion) for _, completion in pairs]
    labels = sorted(set(texts))
    if len(labels) == 1:
        raise DataError(f"{name}: all {len(pairs)} completions are {labels[0]!r}; one class tells nothing")
    if len(labels) > MOST_LABELS:
        raise DataError(
            f"{name}: {len(labels)} different completions, and at most {MOST_LABELS} are taken for labels; "
            "--task=generate compares what is written"
        )
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
