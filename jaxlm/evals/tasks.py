"""Evaluations by name, on the pairs of a split: `generate` writes what follows each prompt and compares it with the
completion; `classify` asks which of the few completions that there are is the most probable. `find` also takes a user's
own `package.module:function`, which is given a `Subject`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import FrozenConfigDict

from jaxlm import lookup
from jaxlm.data import TokenFile, Tokenizer, examples
from jaxlm.errors import ConfigError, DataError, nearest
from jaxlm.evals import scores
from jaxlm.evals.scores import Score
from jaxlm.model import gpt2
from jaxlm.model.decode import complete
from jaxlm.model.gpt2 import Batch, Model, PyTree
from jaxlm.model.sampling import Sampling

MOST_LABELS = 100
SHOWN = 5  # wrong answers
SPARE = 8
"""Tokens that `generate` lets an answer have beyond the longest completion: what is longer is wrong anyway."""


class Subject(NamedTuple):
    """What an evaluation is given."""

    model: Model
    params: PyTree
    tokenizer: Tokenizer
    split: TokenFile
    context_length: int
    batch_size: int  # rows at once, of those that are scored; `generate` has its own number


class Result(NamedTuple):
    metrics: dict[str, float]  # by names that follow "eval/"
    intervals: dict[str, tuple[float, float]]  # 95%, of the same names, where there is one
    details: Any = None  # JSON: all that was found, item by item where that makes sense
    text: str = ""  # what of it is worth a look, in lines


def find(name: str) -> Callable[[Subject], Result]:
    """The evaluation that a name of `eval.tasks` or --task means.

    Raises:
      ConfigError: there is none.
    """
    if name in TASKS:
        return TASKS[name]
    if ":" not in name:
        raise ConfigError(f"unknown task {name!r}: {nearest(name, TASKS)}; or name a package.module:function")
    function = lookup.find("task", name)

    def own(subject: Subject) -> Result:
        found = function(subject)
        if isinstance(found, Result):
            return found
        if isinstance(found, dict) and all(isinstance(value, (int, float)) for value in found.values()):
            return Result({key: float(value) for key, value in found.items()}, {})
        raise ConfigError(f"task {name!r} returned {type(found).__name__}; expected a dict of numbers, or a Result")

    return own


def asker(cfg: FrozenConfigDict, tokenizer: Tokenizer, split: TokenFile | None) -> Callable[[PyTree], dict[str, float]]:
    """What gives the metrics of `eval.tasks` for parameters, named eval/TASK/METRIC.

    Raises:
      ConfigError: an unknown task, or there is nothing to ask.
    """
    functions = [find(name) for name in cfg.eval.tasks]
    if split is None or not cfg.eval.every:
        raise ConfigError(f"eval.tasks={tuple(cfg.eval.tasks)} needs data.validation and eval.every")
    subject = functools.partial(
        Subject,
        model=gpt2.build(cfg.model),
        tokenizer=tokenizer,
        split=split,
        context_length=cfg.model.context_length,
        batch_size=cfg.data.batch_size,
    )

    def ask(params: PyTree) -> dict[str, float]:
        results = [function(subject(params=params)) for function in functions]
        return {f"eval/{name}": value for result in results for name, value in result.metrics.items()}

    return ask


def generate(subject: Subject) -> Result:
    """Greedy answers: exact_match, f1 (SQuAD's), and by sacrebleu bleu and chrf, where it is installed."""
    tokenizer, pairs = subject.tokenizer, examples.pairs(subject.tokenizer, subject.split)
    longest = max(len(completion) for _, completion in pairs) + SPARE
    room = max(1, subject.context_length - longest)
    completions = complete(
        subject.model,
        subject.model.unstack(subject.params),
        [(prompt.tolist() or [tokenizer.end_of_text])[-room:] for prompt, _ in pairs],
        [0] * len(pairs),
        max_tokens=longest,
        context_length=subject.context_length,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        sampling=Sampling(temperature=0.0),
        beyond="stop",
    )
    answers = [tokenizer.decode(completion.tokens) for completion in completions]
    references = [tokenizer.decode(completion) for _, completion in pairs]
    found = {
        "exact_match": scores.mean(list(map(scores.exact_match, answers, references))),
        "f1": scores.mean(list(map(scores.token_f1, answers, references))),
    }
    try:
        found |= scores.corpus(answers, references)
    except ImportError:
        print("generate: no bleu and chrf, which need sacrebleu: pip install 'jaxlm[tasks]'", file=sys.stderr)
    prompts = [tokenizer.decode(prompt) for prompt, _ in pairs]
    details = [
        {"prompt": prompt, "answer": answer, "reference": reference}
        for prompt, answer, reference in zip(prompts, answers, references, strict=True)
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


TASKS: dict[str, Callable[[Subject], Result]] = {
    "generate": generate,
    "classify": classify,
    "classify_by_length": classify_by_length,
}


def _classified(name: str, subject: Subject, by_length: bool) -> Result:
    tokenizer, pairs = subject.tokenizer, examples.pairs(subject.tokenizer, subject.split)
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
    found = log_likelihoods(subject, rows).reshape(len(pairs), len(labels))
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
    names = [repr(label) for label in labels]
    width = max(len("predicted:"), *map(len, names))
    cells = [max(len(name), len(str(counts.max()))) for name in names]
    head = " ".join(["\npredicted:".ljust(width + 1), *(name.rjust(n) for name, n in zip(names, cells))])
    rows = [
        " ".join([name.ljust(width), *(str(x).rjust(n) for x, n in zip(row, cells))])
        for name, row in zip(names, counts)
    ]
    return "\n".join([head, *rows]) + "\n"


def log_likelihoods(subject: Subject, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """float64[rows]: in nats, of each completion and the end of text after it, given its prompt.

    A prompt that leaves no room is cut on the left.

    Raises:
      DataError: a completion that fills the context.
    """
    end, T = [subject.tokenizer.end_of_text], subject.context_length
    sequences, counted = [], []
    for prompt, completion in rows:
        room = T - len(completion)
        if room < 1:
            raise DataError(f"a completion of {len(completion)} tokens fills the context of {T}")
        head = (prompt.tolist() or end)[-room:]
        sequences.append([*head, *completion.tolist(), *end])
        counted.append(len(completion) + 1)
    length = min(T, 1 << (max(map(len, sequences)) - 2).bit_length())
    order = np.argsort([len(sequence) for sequence in sequences], kind="stable")
    out = np.zeros(len(rows))
    for first in range(0, len(order), subject.batch_size):
        chosen = order[first : first + subject.batch_size]
        batch = {name: np.zeros((subject.batch_size, length), np.int32) for name in ("inputs", "targets")}
        batch["weights"] = np.zeros((subject.batch_size, length), np.float32)
        for b, row in enumerate(chosen):
            ids, n = sequences[row], len(sequences[row]) - 1
            batch["inputs"][b, :n], batch["targets"][b, :n] = ids[:-1], ids[1:]
            batch["weights"][b, n - counted[row] : n] = 1
        out[chosen] = np.asarray(_row_sums(subject.model, subject.params, batch))[: len(chosen)]
    return out


def row_log_likelihoods(model: Model, params: PyTree, batch: Batch) -> Float[Array, "B"]:
    """Weighted sums over each row of a batch, float32. Pure."""
    logits = model.apply(params, batch)
    at_target = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    return jnp.sum(batch["weights"] * (at_target - jax.nn.logsumexp(logits, axis=-1)), axis=-1)


_row_sums = jax.jit(row_log_likelihoods, static_argnames="model")


def _result(name: str, found: dict[str, Score], details: Any, text: str) -> Result:
    metrics = {f"{name}/{key}": score.value for key, score in found.items()}
    return Result(metrics, {f"{name}/{key}": (score.low, score.high) for key, score in found.items()}, details, text)
