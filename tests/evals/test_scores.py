"""Scores of answers: SQuAD's by hand, corpus scores as sacrebleu's, intervals that hold the truth."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.evals import scores

# (answer, reference, exact match, F1), worked out by SQuAD's rules: lower case, no punctuation, no articles
BY_HAND = [
    ("Paris", "Paris", 1, 1),
    (" Paris\n", "Paris", 1, 1),
    ("paris", "Paris", 0, 1),
    ("the cat", "a cat", 0, 1),
    ("The Cat!", "cat", 0, 1),
    ("an apple", "apple pie", 0, 2 / 3),
    ("apple pie", "apple", 0, 2 / 3),
    ("red blue", "blue red", 0, 1),
    ("red red blue", "red blue", 0, 4 / 5),
    ("red", "blue", 0, 0),
    ("", "blue", 0, 0),
    ("", "", 1, 1),
    ("the", "a", 0, 1),  # both are empty once the articles are gone
    ("the", "blue", 0, 0),
    ("e-mail", "email", 0, 1),
    ("1,000 men", "1000 men", 0, 1),
    ("in the year 1990", "1990", 0, 1 / 2),
    ("theatre", "the atre", 0, 0),
    ("one two three four", "three four five six", 0, 1 / 2),
    ("U.S.A.", "usa", 0, 1),
]


@pytest.mark.parametrize(("answer", "reference", "exact", "f1"), BY_HAND)
def test_squad_by_hand(answer, reference, exact, f1):
    assert scores.exact_match(answer, reference) == exact
    assert scores.token_f1(answer, reference) == pytest.approx(f1)
    assert scores.token_f1(reference, answer) == pytest.approx(f1)


@given(st.text("ab the.", max_size=12))
def test_an_answer_is_as_good_as_itself(text):
    assert scores.exact_match(text, text) == scores.token_f1(text, text) == 1


def test_corpus_scores_are_sacrebleus():
    from sacrebleu import corpus_bleu, corpus_chrf

    references = ["the cat sat on the mat today", "he reads a long book every week", "we like the green garden a lot"]
    answers = ["the cat sat on a mat today", "he reads a book every week", "we like the green garden a lot"]
    found = scores.corpus(answers, references)
    assert found["bleu"].value == pytest.approx(corpus_bleu(answers, [references]).score)
    assert found["chrf"].value == pytest.approx(corpus_chrf(answers, [references]).score)
    for score in found.values():
        assert 0 < score.low < score.value < 100 and score.low < score.high
    assert scores.corpus(references, references)["bleu"].value == pytest.approx(100)


def test_macro_f1_by_hand():
    wanted, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 2]
    # label 0: 2 of 3 and 2 of 3; label 1: 1 of 2 and 1 of 2; label 2: all
    assert scores.macro_f1(predicted, wanted).value == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert scores.macro_f1([0, 1], [0, 1])[:2] == (1.0, 1.0)
    assert scores.confusion(predicted, wanted, 3).tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_macro_f1_of_many_labels_is_quick_and_that_of_each_label_in_turn():
    """It once compared all items with each label, in each of a thousand draws."""
    rng = np.random.default_rng(0)
    predicted, wanted = rng.choice([-3, 0, 7, 90], 60), rng.choice([0, 7, 8], 60)

    def slowly(predicted, wanted):
        def f1(chosen):
            a, b = predicted[chosen], wanted[chosen]
            of_each = [2 * ((a == n) & (b == n)).sum() / ((a == n).sum() + (b == n).sum()) for n in np.union1d(a, b)]
            return float(np.mean(of_each))

        return scores.bootstrap(f1, len(wanted))

    assert scores.macro_f1(predicted, wanted) == slowly(predicted, wanted)
    many = rng.integers(0, 100, (2, 2000))
    times = []
    for way in (slowly, scores.macro_f1):
        start = time.process_time()
        way(*many)
        times.append(time.process_time() - start)
    assert times[1] < times[0] / 5


def test_the_interval_of_a_mean_holds_the_truth():
    """Of 200 samples of 100 answers, right with chance 0.7: 95% less what 1,000 draws and a skewed share cost."""
    rng = np.random.default_rng(0)
    found = [scores.mean(rng.random(100) < 0.7) for _ in range(200)]
    assert 0.9 <= np.mean([low <= 0.7 <= high for _, low, high in found]) <= 0.99
    assert np.mean([high - low for _, low, high in found]) == pytest.approx(2 * 1.96 * (0.21 / 100) ** 0.5, rel=0.1)
    assert scores.mean([0.25, 0.75]) == scores.mean([0.25, 0.75])  # the same draws each time
