"""How good answers are, and how sure that is: exact match, token F1, BLEU and chrF, accuracy and macro-F1.

Intervals are percentiles of a bootstrap over the items (Efron and Tibshirani, "An introduction to the bootstrap", 1993,
chapter 13), with a fixed seed: the items are drawn anew, the model and its training are not.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 1000
CONFIDENCE = 0.95


class Score(NamedTuple):
    value: float
    low: float  # of the 95% interval
    high: float


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, single spaces: as SQuAD's script compares answers
    (Rajpurkar et al. 2016, arXiv:1606.05250)."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(answer: str, reference: str) -> float:
    """1 where they are the same, but for white space at the ends."""
    return float(answer.strip() == reference.strip())


def token_f1(answer: str, reference: str) -> float:
    """SQuAD's F1 of the words of two texts, after `normalised`; where one has no words, 1 if neither has."""
    given, wanted = normalised(answer).split(), normalised(reference).split()
    if not given or not wanted:
        return float(given == wanted)
    common = sum((collections.Counter(given) & collections.Counter(wanted)).values())
    if not common:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def mean(values: ArrayLike) -> Score:
    """Of scores [items], at least one."""
    x = np.asarray(values, float)
    return bootstrap(lambda chosen: x[chosen].mean(), len(x))


def bootstrap(statistic: Callable[[np.ndarray], float], items: int) -> Score:
    """A statistic of chosen items, int64[items] with repetitions; and the interval of what other draws give."""
    rng = np.random.default_rng(0)
    draws = [statistic(rng.integers(0, items, items)) for _ in range(RESAMPLES)]
    tail = (1 - CONFIDENCE) / 2
    return Score(float(statistic(np.arange(items))), *map(float, np.quantile(draws, [tail, 1 - tail])))


def corpus(answers: Sequence[str], references: Sequence[str]) -> dict[str, Score]:
    """{"bleu", "chrf"} by sacrebleu with its defaults, 0 to 100 (Post 2018, arXiv:1804.08771; Popović
    2015, "chrF").

    Raises:
      ImportError: there is no sacrebleu.
    """
    from sacrebleu.metrics import BLEU, CHRF

    found = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        # Its own bootstrap fails where some draws score 0 and some don't (2.6.0), but what it adds up is there.
        whole = float(metric.corpus_score(list(answers), [list(references)]).score)
        parts = np.array(metric._extract_corpus_statistics(list(answers), [list(references)]), float)

        def score(chosen: np.ndarray, metric: Any = metric, parts: np.ndarray = parts) -> float:
            return float(metric._compute_score_from_stats(list(parts[chosen].sum(0))).score)

        found[name] = bootstrap(score, len(answers))._replace(value=whole)
    return found


def macro_f1(predicted: ArrayLike, wanted: ArrayLike) -> Score:
    """The mean over labels of their F1, of labels int[items]: of those on either side, as scikit-learn takes it."""
    labels, numbers = np.unique(np.stack([predicted, wanted]), return_inverse=True)
    given, right = numbers.reshape(2, -1)

    def score(chosen: np.ndarray) -> float:
        a, b = given[chosen], right[chosen]
        both, of_a, of_b = (np.bincount(x, minlength=len(labels)) for x in (a[a == b], a, b))
        drawn = of_a + of_b > 0
        return float(np.mean(2 * both[drawn] / (of_a + of_b)[drawn]))

    return bootstrap(score, len(given))


def confusion(predicted: ArrayLike, wanted: ArrayLike, labels: int) -> np.ndarray:
    """int64[labels, labels]: rows are what was wanted, columns what was predicted."""
    out = np.zeros((labels, labels), np.int64)
    np.add.at(out, (np.asarray(wanted), np.asarray(predicted)), 1)
    return out
