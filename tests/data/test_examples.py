"""Rows of whole examples: what they hold, in which order, packed or not; and what is left out, aloud."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm import config, data
from jaxlm.data import batches, examples
from jaxlm.data.tokenizers import Bytes
from jaxlm.errors import ConfigError, DataError

END = 256  # end of text, of the bytes tokenizer


@pytest.fixture
def opened(tmp_path):
    """`opened(pairs, T, **fields)`: (data section, what is open, T)."""

    def make(rows, **fields):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
        cfg = config.default()
        cfg.data.update({"source": str(path), "validation": "", "format": "pairs", "batch_size": 4} | fields)
        return cfg.data, data.open(cfg.data)

    return make


def ids(text):
    return list(text.encode())


def rows_of(batch):
    """{(example's tokens): what of it counts} of a batch, by segments."""
    found = []
    segments = batch.get("segment_ids", np.where(np.cumsum(batch["weights"][:, ::-1], 1)[:, ::-1] > 0, 1, 0))
    for b, row in enumerate(segments):
        for number in sorted(set(row) - {0}):
            here = row == number
            tokens = [*batch["inputs"][b, here], batch["targets"][b, here][-1]]
            assert tokens[1:] == list(batch["targets"][b, here])
            found.append((tokens, list(batch["weights"][b, here])))
    return found


PAIRS = [("ab", "cd"), ("", "xyz"), ("question", "a"), ("e", "f")]


@pytest.mark.parametrize("pack", [False, True])
def test_an_example_is_prompt_completion_and_end_of_text(opened, pack):
    section, found = opened(PAIRS, pack=pack)
    held = data.held_out(section, found.tokenizer, found.train, 12, 4)
    (batch,) = held.batches
    assert {x.shape for x in batch.values()} == {(4, 12)}
    expected = [
        ([*ids("abcd"), END], [0, 1, 1, 1]),
        ([END, *ids("xyz"), END], [1, 1, 1, 1]),
        ([*ids("questiona"), END], [0] * 7 + [1, 1]),
        ([*ids("ef"), END], [1, 1]),
    ]
    order = [0, 1, 3, 2] if pack else [0, 1, 2, 3]  # 4 + 4 + 2 in the first row, 9 in the second
    assert rows_of(batch) == [expected[i] for i in order]
    assert held.bytes_per_token == pytest.approx(7 / 11)  # cd xyz a f, and four ends of text
    if pack:
        assert list(batch["positions"][0]) == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 0, 0]
        assert list(batch["segment_ids"][0]) == [1] * 4 + [2] * 4 + [3] * 2 + [0] * 2
        assert batch["weights"][2:].sum() == 0


def test_as_many_rows_are_the_same_ones_whatever_the_batch_size(opened):
    section, found = opened([(f"{i:02d}", "x") for i in range(30)])

    def read(size):
        batches = data.held_out(section, found.tokenizer, found.train, 12, size, 12 // size).batches
        return [row for batch in batches for row in rows_of(batch)]

    assert len(read(1)) == 12
    assert read(3) == read(4) == read(12) == read(1)


def test_the_loss_may_be_on_all(opened):
    section, found = opened([("ab", "cd")], loss_on="all")
    (batch,) = data.held_out(section, found.tokenizer, found.train, 6, 1).batches
    assert batch["weights"].tolist() == [[1, 1, 1, 1, 0, 0]]


def test_long_prompts_are_cut_on_the_left_and_long_completions_dropped(opened):
    pairs = [("0123456789", "ab"), ("p", "0123456789"), ("p", "fits")]
    section, found = opened(pairs)
    rows = examples.Examples(section, found.tokenizer, found.train, 6)
    assert rows_of(rows.take(np.arange(len(rows), dtype=np.uint64))) == [
        ([*ids("6789ab"), END], [0, 0, 0, 1, 1, 1]),
        ([*ids("pfits"), END], [1] * 5),
    ]
    assert str(rows) == (
        "2 pairs in 2 rows, 91.7% of whose positions are used; 1 prompts cut on the left; "
        "1 pairs dropped, which are too long"
    )


def test_long_pairs_are_dropped_or_an_error(opened):
    pairs = [("p", "c"), ("0123456789", "ab")]
    section, found = opened(pairs, too_long="drop")
    rows = examples.Examples(section, found.tokenizer, found.train, 6)
    assert len(rows) == 1 and "1 pairs dropped" in str(rows) and "cut" not in str(rows)
    section, found = opened(pairs, too_long="error")
    with pytest.raises(DataError, match="takes 12 positions, and model.context_length is 6; data.too_long='cut' short"):
        data.training(section, found, 6, seed=0)
    section, found = opened([("p", "0123456789")])
    with pytest.raises(DataError, match="none of the pairs in .* fits a context of 6 tokens"):
        data.training(section, found, 6, seed=0)


@pytest.mark.parametrize("pack", [False, True])
def test_an_epoch_has_every_pair_once_in_an_order_of_its_own(opened, pack):
    pairs = [(f"{i}", "c" * (i % 5 + 1)) for i in range(37)]
    section, found = opened(pairs, pack=pack)
    batches, said = data.training(section, found, 16, seed=3)
    size = batches.num_rows
    assert said.startswith("37 pairs in ")
    epochs = [rows_of(batches.rows(epoch * size, size)) for epoch in range(2)]
    expected = sorted([*ids(p), *ids(c), END] for p, c in pairs)
    assert [sorted(tokens for tokens, _ in epoch) for epoch in epochs] == [expected, expected]
    assert epochs[0] != epochs[1]
    again, _ = data.training(section, found, 16, seed=3)
    assert rows_of(again[2]) == rows_of(batches.rows(8, 4)) and rows_of(again[2]) != rows_of(again[3])
    other, _ = data.training(section, found, 16, seed=4)
    assert rows_of(other[0]) != rows_of(batches[0])


def test_documents_are_packed_too(tmp_path):
    for name, text in {"a": "ab", "b": "cdefghij", "c": "kl"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    cfg = config.default()
    cfg.data.update(source=str(tmp_path), validation="", pack=True)
    found = data.open(cfg.data)
    (batch,) = data.held_out(cfg.data, found.tokenizer, found.train, 6, 3).batches
    assert rows_of(batch) == [
        ([*ids("ab"), END], [1, 1]),  # the first has no end of text before it
        ([*ids("hij"), END], [1, 1, 1]),
        ([END, *ids("cdefgh")], [1] * 6),
        ([END, *ids("kl"), END], [1, 1, 1]),
    ]
    assert sum(batch["weights"].sum(1)) == found.train.num_tokens - 1


@pytest.mark.parametrize("text", ["abcdefghijklmnopqrst", "abc\0defghijklmnopqrst"])
def test_of_a_document_that_was_parted_nothing_is_lost(tmp_path, text):
    tokens = np.array([END if c == "\0" else ord(c) for c in text])
    data.write_tokens(tmp_path / "a.bin", [tokens], Bytes())
    cfg = config.default()
    cfg.data.update(source=str(tmp_path / "a.bin"), validation="25%", pack=True)
    found = data.open(cfg.data)
    for file in (found.train, found.validation):
        (batch,) = data.held_out(cfg.data, found.tokenizer, file, 6, 4).batches
        assert batch["weights"].sum() == file.num_tokens - 1
        assert sorted(batch["targets"][batch["weights"] > 0]) == sorted(file.tokens[1:])


def test_a_token_file_has_no_pairs(tmp_path, opened):
    section, found = opened(PAIRS)
    section.source = str(found.train.path)
    with pytest.raises(
        ConfigError, match="train.bin is a token file, which holds text; data.format='pairs' reads rows"
    ):
        data.open(section)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_first_fit_is_its_definition(sizes):
    room: list[int] = []
    expected = []
    for size in sizes:
        place = next((i for i, left in enumerate(room) if left >= size), len(room))
        if place == len(room):
            room.append(20)
        room[place] -= size
        expected.append(place)
    assert examples.first_fit(np.array(sizes), 20).tolist() == expected


@given(st.lists(st.sampled_from([0, 1, 2, END]), min_size=1, max_size=60), st.integers(1, 9))
def test_rows_of_documents_are_their_definition(tokens, T):
    spans, before = [], 0
    for end in sorted({*(i for i, token in enumerate(tokens) if token == END), len(tokens) - 1}):
        for start in range(before, end, T):
            spans.append([start, start + 1, start + 1, min(start + T, end) + 1])
        before = end
    assert examples._documents(np.array(tokens), END, T).tolist() == spans


@given(st.lists(st.sampled_from([0, 1, END]), max_size=60))
def test_ends_are_found_by_parts(tokens):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "_PART", 7)
        assert examples._ends(np.array(tokens, int), END).tolist() == [i for i, x in enumerate(tokens) if x == END]


def test_ends_take_no_memory_for_each_token():
    tokens = np.zeros(32 * 2**20, np.uint16)
    tokens[::4096] = END
    tracemalloc.start()
    try:
        examples._documents(tokens, END, 1024)
        assert tracemalloc.get_traced_memory()[1] < len(tokens) / 2
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("fields", [{}, {"loss_on": "all"}, {"pack": True}])
def test_bytes_per_token_are_those_of_the_tokens_that_count(opened, fields, monkeypatch):
    monkeypatch.setattr(examples, "_PART", 8)
    random = np.random.default_rng(0)
    rows = [("é" * int(p), "ab" * int(c)) for p, c in random.integers([0, 1], 9, (60, 2))]
    section, found = opened(rows, **fields)
    held = data.held_out(section, found.tokenizer, found.train, 24, 4)
    counted = [batch["targets"][batch["weights"] > 0] for batch in held.batches]
    lengths = found.tokenizer.byte_lengths[np.concatenate(counted)]
    assert held.bytes_per_token == lengths.sum() / lengths.size


# Augmentation


def epochs(section, found, T, count=3):
    """The batches of so many epochs of training."""
    batches, _ = data.training(section, found, T, seed=0)
    return [batches.rows(epoch * batches.num_rows, batches.num_rows) for epoch in range(count)]


@pytest.mark.parametrize("pack", [False, True])
def test_crops_take_from_the_left_of_prompts_what_each_epoch_draws(opened, pack):
    pairs = [(f"{i}" + "abcdefghijklmnopqrs", f"+{i}") for i in range(8)]
    section, found = opened(pairs, crop=0.5, pack=pack)
    seen = []
    for batch in epochs(section, found, 30):
        prompts = {}
        for tokens, weights in rows_of(batch):
            text = bytes(tokens[:-1]).decode()
            prompt, _, number = text.partition("+")
            assert (pairs[int(number)][0]).endswith(prompt) and 10 <= len(prompt) <= 20
            assert weights == [0] * (len(prompt) - 1) + [1] * (len(number) + 2)
            prompts[int(number)] = len(prompt)
        assert len(prompts) == 8
        seen.append(prompts)
    assert len({tuple(sorted(one.items())) for one in seen}) == 3
    assert len(set(seen[0].values())) > 3
    again = epochs(section, found, 30)[1]
    assert {name: x.tolist() for name, x in again.items()} == {
        name: x.tolist() for name, x in epochs(section, found, 30)[1].items()
    }


def test_what_is_held_out_is_not_cropped(opened):
    section, found = opened(PAIRS)
    cropped, _ = opened(PAIRS, crop=0.9, token_dropout=0.5)
    for one, other in zip(
        data.held_out(section, found.tokenizer, found.train, 12, 4).batches,
        data.held_out(cropped, found.tokenizer, found.train, 12, 4).batches,
        strict=True,
    ):
        assert all((one[name] == other[name]).all() for name in one)


@given(share=st.floats(0, 0.99))
@settings(max_examples=20)
def test_token_dropout_replaces_a_share_of_the_inputs_by_tokens_of_the_text(share):
    text = np.random.default_rng(0).choice(np.array([3, 5, 7], np.uint16), 2000)
    rows = batches.Windows(np.arange(100, 1100, dtype=np.uint16), 50)
    places = np.arange(20, dtype=np.uint64)
    keys = np.full(20, 9, np.uint64)
    plain, noised = rows.take(places, keys), batches.Noised(rows, text, share).take(places, keys)
    assert (noised["targets"] == plain["targets"]).all() and noised["inputs"].dtype == np.int32
    changed = noised["inputs"] != plain["inputs"]
    assert set(noised["inputs"][changed].tolist()) <= {3, 5, 7}
    assert abs(changed.mean() - share) < 0.08  # five deviations
    other = batches.Noised(rows, text, share).take(places, keys + np.uint64(1))["inputs"] < 100
    assert share < 0.01 or (other != changed).any()


def test_crops_are_of_pairs():
    cfg = config.default()
    cfg.data.crop = 0.5
    with pytest.raises(ConfigError, match="data.crop cuts prompts"):
        config.resolve(cfg)
