"""Each made task is that task: nothing held out was trained on, and answers can be told from prompts."""

import collections
import re
import sys

import pytest

from jaxlm.data import made
from jaxlm.errors import DataError

TASKS = {"translation": ("english",), "sentiment": ("review",), "questions": ("facts",)}


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_the_same_each_time_and_none_is_on_both_sides(task):
    rows, held_out = list(getattr(made, task)()), list(getattr(made, f"{task}_held_out")())
    assert rows == list(getattr(made, task)())
    assert len(rows) > 8000 and 900 < len(held_out) < 1100
    assert all(type(value) is str and value for row in rows + held_out for value in row.values())
    asked = [{tuple(row[name] for name in TASKS[task]) for row in side} for side in (rows, held_out)]
    assert not asked[0] & asked[1]


def test_numbers_in_words():
    found = {row["english"]: row["french"] for row in (*made.translation(), *made.translation_held_out())}
    assert len(found) == 10_000
    assert found["ninety-nine"] == "quatre-vingt-dix-neuf"
    assert found["two hundred and five"] == "deux cent cinq"


def test_every_word_of_a_held_out_number_is_in_others():
    words = {word for row in made.translation() for word in row["english"].split()}
    assert words >= {word for row in made.translation_held_out() for word in row["english"].split()}


def test_translation_without_num2words(monkeypatch):
    monkeypatch.setitem(sys.modules, "num2words", None)
    with pytest.raises(DataError, match="pip install 'jaxlm\\[tasks\\]'"):
        next(made.translation())


def test_a_sentiment_is_that_of_the_last_opinion_turned_by_not():
    for row in made.sentiment():
        last = re.split(", but ", row["review"])[-1]
        (word,) = [word for word in last.split() if word in made._GOOD or word in made._BAD]
        good = (word in made._GOOD) != (" not " in last)
        assert row["sentiment"] == ("positive" if good else "negative")


def test_held_out_reviews_are_of_other_things():
    def things(rows):
        return {thing for row in rows for thing in re.findall(r"the (\w+) was", row["review"])}

    assert things(made.sentiment()) == set(made._THINGS)
    assert things(made.sentiment_held_out()) == set(made._NEW_THINGS)
    assert not set(made._THINGS) & set(made._NEW_THINGS)


@pytest.mark.parametrize("rows", [made.sentiment, made.sentiment_held_out])
def test_sentiments_are_balanced(rows):
    counts = collections.Counter(row["sentiment"] for row in rows())
    assert set(counts) == {"positive", "negative"} and 0.45 < counts["positive"] / counts.total() < 0.55


def test_answers_are_in_the_facts_about_who_is_asked_about():
    for row in made.questions_held_out():
        name = next(name for name in made._PEOPLE if name in row["question"])
        facts = re.findall(rf"{name} [^.]*\.", row["facts"])
        assert any(row["answer"] in fact for fact in facts)
        assert len(row["asked"].splitlines()) == 3 and row["question"] not in row["asked"]
