import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data.tokenizers import Bytes, Chars
from jaxlm.errors import ConfigError, DataError
from jaxlm.evals import generation
from jaxlm.evals.generation import Request
from jaxlm.model.gpt2 import Cache, Model

LENGTH = 64
GREEDY = Request(max_tokens=LENGTH, temperature=0)
TEXT = "one, twö; thr€€ ... 😀 four".encode()


def _prefill(script, tokens_BT, start_B, slots):
    return _scores(script, 0, start_B), Cache((), start_B, jnp.int32(1))


def _decode(script, token_B, cache):
    return _scores(script, cache.length, token_B), cache._replace(length=cache.length + 1)


def _scores(script, n, like_B):
    return jnp.tile(8.0 * jax.nn.one_hot(script[n], 257), (len(like_B), 1))


# A model that says what is written in its parameters, whatever the prompt: a token an id.
SCRIPTED = Model(*[lambda *_: None] * 5, lambda params: params, _prefill, _decode, 1000)


def say(text, request=GREEDY, prompts=("",), show=None):
    """Samples of a model that says `text`, and ends."""
    script = np.full(LENGTH, Bytes().end_of_text, np.int32)
    script[: len(text)] = list(text)
    return generation.samples(SCRIPTED, script, Bytes(), prompts, request, 1000, show)


def test_a_text_is_what_the_tokens_spell():
    (sample,) = say(TEXT, prompts=["prompt"])
    assert sample.prompt == "prompt" and sample.text == TEXT.decode()
    assert bytes(sample.tokens) == TEXT and sample.finish_reason == "end_of_text"
    expected = np.log(np.exp(8) / (np.exp(8) + 256))
    np.testing.assert_allclose(sample.logprobs, [expected] * len(TEXT), rtol=1e-4)


def test_a_text_ends_before_a_stop_string():
    (sample,) = say(b"a bc d", GREEDY._replace(stop=["never", "bc d", "c"]))
    assert (sample.text, sample.finish_reason) == ("a b", "stop")  # "c" is complete before "bc d" is
    assert bytes(sample.tokens) == b"a b" and len(sample.logprobs) == 3
    (sample,) = say(b"a bc", GREEDY._replace(stop=["bcd"]))
    assert (sample.text, sample.finish_reason) == ("a bc", "end_of_text")
    (sample,) = say(b"abc", GREEDY._replace(stop=["a"]))
    assert (sample.text, sample.tokens, sample.finish_reason) == ("", [], "stop")


def test_a_stop_string_within_a_token_keeps_the_token(monkeypatch):
    class Words(Bytes):
        """A token is a letter and a dot."""

        def decode(self, ids):
            return "".join(chr(id) + "." for id in ids if id != self.end_of_text)

    monkeypatch.setattr("tests.evals.test_generation.Bytes", Words)
    (sample,) = say(b"abc", GREEDY._replace(stop=[".c"]))
    assert (sample.text, bytes(sample.tokens), sample.finish_reason) == ("a.b", b"ab", "stop")


def test_the_space_between_a_prompt_and_its_text_stays(monkeypatch):
    class Spaced(Bytes):
        """A text begins without a space."""

        def decode(self, ids):
            return super().decode(ids).removeprefix(" ")

        def decode_on(self, ids):
            return super().decode(ids)

    monkeypatch.setattr("tests.evals.test_generation.Bytes", Spaced)
    pieces = []
    (sample,) = say(b" b c", GREEDY._replace(stop=[" c"]), prompts=["a"], show=pieces.append)
    assert sample.text == "".join(pieces) == " b" and bytes(sample.tokens) == b" b"
    assert [one.text for one in say(b" b", prompts=["", "a"])] == ["b", " b"]


def test_a_stop_string_wins_over_what_else_ends_the_text():
    (sample,) = say(b"a" * LENGTH, GREEDY._replace(stop=["a" * LENGTH]))
    assert (sample.text, sample.finish_reason) == ("", "stop")
    (sample,) = say(b"a" * LENGTH)
    assert (sample.text, sample.finish_reason) == ("a" * LENGTH, "length")


def test_text_is_shown_as_it_comes_and_in_whole_characters():
    pieces = []
    say(TEXT, show=pieces.append)
    assert "".join(pieces) == TEXT.decode()
    assert [piece for piece in pieces if piece] == list(TEXT.decode())


def test_what_may_begin_a_stop_string_waits():
    pieces = []
    say(b"abcabd", GREEDY._replace(stop=["abd"]), show=pieces.append)
    assert [piece for piece in pieces if piece] == ["abc"]


def test_what_is_shown_is_the_text_whatever_the_bytes_and_the_stop_strings():
    rng = random.Random(0)
    alphabet = [b"a", b"b", "é".encode(), "€".encode(), "😀".encode(), b"\xe2", b"\x82", b"\xff", b"\xf0\x9f"]
    stops = ["a", "ab", "ba", "aab", "b", "aba", "é", "bé", "€😀", "😀a", "aaaa"]
    for _ in range(150):
        text = b"".join(rng.choices(alphabet, k=12))[: LENGTH - 1]
        request = GREEDY._replace(stop=rng.sample(stops, rng.randrange(4)))
        pieces = []
        shown = say(text, request, show=pieces.append)
        (whole,) = say(text, request)
        assert shown == [whole], (text, request.stop)
        assert "".join(pieces) == whole.text
        decoded = Bytes().decode(list(text))
        first = min((decoded.find(s) + len(s) for s in request.stop if s in decoded), default=None)
        assert whole.finish_reason == ("end_of_text" if first is None else "stop")
        if first is None:
            assert whole.text == decoded
        else:
            assert any(decoded[:first] == whole.text + s for s in request.stop)


def test_sample_n_has_seed_plus_n_whatever_else_is_asked_for():
    request = Request(max_tokens=8, num_samples=3, seed=4, temperature=3.0)
    found = say(b"abcdefgh", request, prompts=["a", "b"])
    assert [(sample.prompt, sample.seed) for sample in found] == [(p, s) for p in "ab" for s in (4, 5, 6)]
    assert found[:3] == [sample._replace(prompt="a") for sample in found[3:]]
    assert len({sample.text for sample in found}) == 3
    assert say(b"abcdefgh", request._replace(num_samples=1, seed=5), prompts=["b"]) == [found[4]]


def test_an_empty_prompt_begins_with_the_end_of_text():
    assert generation.encode(Bytes(), "") == [256]
    assert generation.encode(Bytes(), "é") == [0xC3, 0xA9]


def test_a_character_that_the_tokenizer_does_not_know():
    with pytest.raises(DataError, match="character 'x'"):
        generation.samples(SCRIPTED, np.zeros(LENGTH, np.int32), Chars("ab"), ["ax"], GREEDY, 1000)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", value) for value in (-0.1, float("nan"), float("inf"), 1e39)],
        *[("top_p", value) for value in (0.0, -1.0, 1.1, float("nan"))],
        *[("top_k", value) for value in (-1, 2**31)],
        *[("repetition_penalty", value) for value in (0.0, -1.0, float("nan"), float("inf"), 1e-46)],
        *[
            ("max_tokens", 0),
            ("num_samples", 0),
            ("num_samples", 2**40),
            ("seed", -1),
            ("seed", 2**32),
            ("stop", ["a", ""]),
            ("stop", "END"),
            ("stop", [3]),
            ("stop", None),
            ("beyond", "grow"),
        ],
    ],
)
def test_what_makes_no_sense_is_refused(field, value):
    generation.check(GREEDY)
    with pytest.raises(ConfigError, match=f"^{field} is .*; expected"):
        say(b"a", GREEDY._replace(**{field: value}))


@pytest.mark.parametrize("prompts", ["def", [b"def"], None])
def test_prompts_are_a_list_of_strings(prompts):
    """A string was once taken for a prompt of each of its letters."""
    with pytest.raises(ConfigError, match="^prompts is .*; expected a list of strings"):
        say(b"a", prompts=prompts)


def test_seeds_of_all_samples_are_in_range():
    generation.check(GREEDY._replace(seed=2**32 - 2, num_samples=2))
    with pytest.raises(ConfigError, match="^seed is 4294967294"):
        generation.check(GREEDY._replace(seed=2**32 - 2, num_samples=3))
