"""Pairs made on the spot, for runs without a network: small tasks that are still what they are called.

Each function gives rows, in an order that is always the same; `data.source = "jaxlm.data.made:translation"` reads them.
None of the rows of `X_held_out` is in `X`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from jaxlm.errors import DataError

Rows = Iterator[dict[str, str]]

_NUMBERS = 10_000
_REVIEWS, _HELD_OUT_REVIEWS = 20_000, 1_000
_STORIES, _HELD_OUT_STORIES = 20_000, 1_000


# Translation: the numbers below ten thousand in words, English to French. One in ten is held out, from 100 on.


def translation() -> Rows:
    """`english`, `french`: "two hundred and five", "deux cent cinq"."""
    return _numbers(held_out=False)


def translation_held_out() -> Rows:
    return _numbers(held_out=True)


def _numbers(held_out: bool) -> Rows:
    try:
        from num2words import num2words
    except ImportError as error:
        raise DataError("jaxlm.data.made:translation needs num2words: pip install 'jaxlm[tasks]'") from error
    draw = random.Random(0)
    for number in range(_NUMBERS):
        if (number >= 100 and draw.random() < 0.1) == held_out:
            yield {"english": num2words(number), "french": num2words(number, lang="fr")}


# Sentiment: sentences of a grammar. What they speak of in held-out rows is spoken of in no other; a negation turns the
# word after it, and of two opinions the one after "but" counts.

_THINGS = (
    *("acting", "album", "bakery", "battery", "bread", "cake", "camera", "chair", "cheese", "coffee", "concert"),
    *("dentist", "dessert", "dinner", "ending", "festival", "film", "garden", "guide", "hotel", "keyboard", "kitchen"),
    *("laptop", "lecture", "lunch", "menu", "museum", "music", "novel", "painting", "party", "phone", "plot", "poem"),
    *("room", "salad", "screen", "script", "service", "singer", "soup", "staff", "story", "taxi", "teacher", "tea"),
    *("theatre", "ticket", "tour", "trip", "view", "waiter", "wedding", "weather"),
)
_NEW_THINGS = ("airport", "breakfast", "ceiling", "dancer", "exhibition", "lamp", "market", "opera", "pizza", "zoo")
_GOOD = (
    *("amazing", "beautiful", "brilliant", "charming", "delightful", "excellent", "fantastic", "great", "lovely"),
    *("marvellous", "perfect", "pleasant", "splendid", "superb", "wonderful"),
)
_BAD = (
    *("awful", "boring", "disappointing", "dreadful", "dull", "horrible", "mediocre", "poor", "sad", "shabby"),
    *("terrible", "tiresome", "ugly", "unpleasant", "weak"),
)
_DEGREES = ("", "", "quite ", "really ", "truly ", "so ", "very ")
_OPENINGS = ("", "", "", "honestly, ", "in the end, ", "to my surprise, ", "we agreed that ", "i think ")


def sentiment() -> Rows:
    """`review`, `sentiment`: "the soup was quite good, but the staff was not pleasant", "negative"."""
    return _reviews(_THINGS, _REVIEWS, seed=0)


def sentiment_held_out() -> Rows:
    return _reviews(_NEW_THINGS, _HELD_OUT_REVIEWS, seed=1)


def _reviews(things: tuple[str, ...], count: int, seed: int) -> Rows:
    draw = random.Random(seed)

    def opinion(good: bool) -> str:
        thing, degree, negated = draw.choice(things), draw.choice(_DEGREES), draw.random() < 0.25
        word = draw.choice(_GOOD if good != negated else _BAD)
        return f"the {thing} was {'not ' if negated else ''}{degree}{word}"

    for _ in range(count):
        good = draw.random() < 0.5
        said = opinion(good)
        if draw.random() < 0.3:
            said = f"{opinion(not good)}, but {said}"
        yield {"review": draw.choice(_OPENINGS) + said, "sentiment": "positive" if good else "negative"}


# Questions: a few facts about people, drawn anew for each row, and questions about all of them, one after another, of
# which the last one is to be answered.

_PEOPLE = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gwen", "Hugo", "Iris", "Jack", "Kim", "Leo", "Mia", "Noah")
_FACTS = {
    "{} lives in {}.": ("Where does {} live?", ("Athens", "Berlin", "Cairo", "Delhi", "Lima", "Oslo", "Paris", "Rome")),
    "{} works as a {}.": (
        "What is {}'s job?",
        ("baker", "doctor", "farmer", "nurse", "painter", "pilot", "sailor", "teacher"),
    ),
    "{} has a {}.": ("Which animal does {} have?", ("bird", "cat", "dog", "fish", "goat", "horse", "mouse", "rabbit")),
}


def questions() -> Rows:
    """`facts`, `asked`, `question`, `answer`: "Ada has a cat. Ben lives in Rome. ...", "Where does Ben live? Rome ...",
    "Which animal does Ada have?", "cat"."""
    return _stories(_STORIES, seed=0)


def questions_held_out() -> Rows:
    known = {row["facts"] for row in questions()}
    return (row for row in _stories(_HELD_OUT_STORIES, seed=1) if row["facts"] not in known)


def _stories(count: int, seed: int) -> Rows:
    draw = random.Random(seed)
    for _ in range(count):
        told = [
            (person, kind, draw.choice(_FACTS[kind][1]))
            for person in draw.sample(_PEOPLE, 2)
            for kind in draw.sample(list(_FACTS), 2)
        ]
        draw.shuffle(told)
        facts = " ".join(kind.format(person, answer) for person, kind, answer in told)
        draw.shuffle(told)
        *asked, (question, answer) = [(_FACTS[kind][0].format(person), answer) for person, kind, answer in told]
        before = "\n".join(f"{question} {answer}" for question, answer in asked)
        yield {"facts": facts, "asked": before, "question": question, "answer": answer}
