from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data import Batches, Windows, evaluation, prefetch
from jaxlm.data.batches import _mix, permutation
from jaxlm.errors import ConfigError, DataError

GOLDEN_10 = [5, 3, 4, 2, 8, 9, 6, 0, 1, 7]
GOLDEN_1000 = [105, 290, 766, 868, 93, 640, 266, 798]
GOLDEN_BIG = [994173361020061, 981899021555705, 579886278595104, 575421469376903]
GOLDEN_STARTS = [[54, 894, 254, 904], [751, 991, 491, 211], [151, 831, 801, 11]]


def permuted(size: int, key: int) -> np.ndarray:
    return permutation(np.arange(size, dtype=np.uint64), size, np.array([key], np.uint64))


# The permutation


@given(st.one_of(st.integers(1, 40), st.integers(1, 5000)), st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permuted(size, key)) == list(range(size))


def test_permutation_is_the_same_for_ever() -> None:
    """Golden values: if these change, no run can be repeated or resumed. Don't update them."""
    assert permuted(10, 0).tolist() == GOLDEN_10
    assert permuted(1000, 12345)[:8].tolist() == GOLDEN_1000
    big = permutation(np.arange(4, dtype=np.uint64), 10**15, np.array([2**64 - 1], np.uint64))
    assert big.tolist() == GOLDEN_BIG


@pytest.mark.parametrize("size", [2, 3, 5, 6, 12])
def test_permutation_is_uniform_on_small_sizes(size: int) -> None:
    keys = _mix(np.arange(1, 6001, dtype=np.uint64))
    for i in range(size):
        counts = np.bincount(permutation(np.full(len(keys), i, np.uint64), size, keys).astype(int), minlength=size)
        expected = len(keys) / size
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected), (i, counts)


def test_permutation_has_no_runs() -> None:
    steps = np.diff(permuted(10_000, 7).astype(np.int64))
    assert np.count_nonzero(np.abs(steps) == 1) < 10  # two expected


# Batches


def windows_of_epoch(batches: Batches, epoch: int) -> np.ndarray:
    return batches.rows(epoch * batches.num_rows, batches.num_rows)["targets"]


@settings(max_examples=50)
@given(st.integers(2, 300), st.integers(1, 40), st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_each_window_comes_once_an_epoch(size: int, length: int, seed: int, epoch: int) -> None:
    length = min(length, size - 1)
    batches = Batches(Windows(np.arange(size, dtype=np.uint16), length), 4, seed)
    targets = windows_of_epoch(batches, epoch)
    assert targets.shape == (size // length, length)
    assert len(np.unique(targets)) == targets.size, "no token is a target twice"
    inputs = batches.rows(epoch * batches.num_rows, batches.num_rows)["inputs"]
    np.testing.assert_array_equal((inputs + 1) % size, targets)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(0, 100), st.integers(0, 30))
def test_rows_do_not_depend_on_the_batch_size(seed: int, batch_size: int, first: int, count: int) -> None:
    tokens = np.arange(500, dtype=np.uint16) * 7
    one = Batches(Windows(tokens, 16), 1, seed)
    rows = Batches(Windows(tokens, 16), batch_size, seed).rows(first, count)
    for name in ("inputs", "targets", "weights"):
        singles = [one[n][name] for n in range(first, first + count)]
        np.testing.assert_array_equal(rows[name], np.concatenate([np.empty((0, 16)), *singles]))


def test_batch_n_is_rows_from_n_times_batch_size() -> None:
    batches = Batches(Windows(np.arange(500), 16), 6, seed=3)
    np.testing.assert_array_equal(batches[5]["inputs"], batches.rows(30, 6)["inputs"])
    with pytest.raises(IndexError, match="count from 0"):
        batches[-1]


def test_types_and_shapes() -> None:
    batch = Batches(Windows(np.arange(100, dtype=np.uint16), 8), 3, seed=0)[0]
    assert {name: (a.dtype, a.shape) for name, a in batch.items()} == {
        "inputs": (np.int32, (3, 8)),
        "targets": (np.int32, (3, 8)),
        "weights": (np.float32, (3, 8)),
    }
    assert batch["weights"].all()


def test_order_is_of_seed_and_epoch() -> None:
    def epoch(seed: int, n: int) -> list[list[int]]:
        return windows_of_epoch(Batches(Windows(np.arange(1000), 10), 4, seed), n).tolist()

    assert epoch(0, 0) == epoch(0, 0)
    assert epoch(0, 0) != epoch(1, 0) and epoch(0, 0) != epoch(0, 1)
    cuts = {min(row[0] for row in epoch(0, n)) % 10 for n in range(20)}
    assert len(cuts) > 3, "windows are cut elsewhere in other epochs"


def test_batches_are_the_same_for_ever() -> None:
    """Golden values, as of the permutation: they hold the epoch's shift and keys too. Don't update them."""
    batches = Batches(Windows(np.arange(1000), 10), 4, seed=42)
    assert [batches[n]["inputs"][:, 0].tolist() for n in (0, 25, 10**9)] == GOLDEN_STARTS


def test_one_window_and_windows_over_the_seam() -> None:
    batches = Batches(Windows(np.arange(11), 10), 2, seed=0)
    assert batches.num_rows == 1
    starts = [int(row[0]) for n in range(50) for row in batches[n]["inputs"]]
    assert len(set(starts)) == 11, "each epoch of one window starts elsewhere"
    for row in batches.rows(0, 50)["targets"]:
        np.testing.assert_array_equal(np.diff(row) % 11, 1)


def test_too_short_a_text() -> None:
    with pytest.raises(
        DataError, match="text of 10 tokens is shorter than one window of 11; lower model.context_length"
    ):
        Windows(np.arange(10), 10)
    assert len(Windows(np.arange(11), 10)) == 1


# Evaluation


@settings(max_examples=60)
@given(st.integers(2, 400), st.integers(1, 7), st.integers(1, 30))
def test_evaluation_covers_each_target_once(size: int, batch_size: int, length: int) -> None:
    tokens = np.arange(1000, 1000 + size, dtype=np.uint16)
    seen = []
    batches = evaluation(tokens, batch_size, length)
    for batch in batches:
        assert all(array.shape == (batch_size, length) for array in batch.values())
        counted = batch["weights"] == 1
        assert not batch["inputs"][~counted].any() and not batch["targets"][~counted].any()
        assert not batch["weights"][~counted].any()
        np.testing.assert_array_equal(batch["inputs"][counted] + 1, batch["targets"][counted])
        seen += batch["targets"][counted].tolist()
    assert seen == list(range(1001, 1000 + size))
    assert len(batches) == -(-(size - 1) // (batch_size * length))


@settings(max_examples=100)
@given(st.integers(2, 300), st.integers(1, 5), st.integers(1, 20), st.data())
def test_sliding_windows_count_each_target_once_with_the_context_that_they_owe(
    size: int, batch_size: int, length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, length))
    seen = []
    for batch in evaluation(np.arange(size), batch_size, length, stride=stride):
        for row, column in np.argwhere(batch["weights"] == 1):
            target = batch["targets"][row, column]
            assert column + 1 >= min(target, length - stride + 1)
            np.testing.assert_array_equal(batch["inputs"][row, : column + 1], target - 1 - np.arange(column, -1, -1))
            seen.append(target)
    assert seen == list(range(1, size))


def test_a_stride_of_the_context_is_no_overlap() -> None:
    tokens = np.arange(100)
    for plain, sliding in zip(evaluation(tokens, 2, 10), evaluation(tokens, 2, 10, stride=10), strict=True):
        for name in plain:
            np.testing.assert_array_equal(plain[name], sliding[name])


@pytest.mark.parametrize("stride", [-1, 11])
def test_a_stride_that_cannot_be_is_named(stride: int) -> None:
    with pytest.raises(ConfigError, match=f"stride is {stride}; expected from 1 to the context of 10 tokens"):
        evaluation(np.arange(100), 2, 10, stride=stride)


def test_evaluation_limit_is_spread_over_the_split() -> None:
    tokens = np.arange(1 + 100 * 20)
    every = evaluation(tokens, 2, 10)
    assert len(every) == 100
    some = evaluation(tokens, 2, 10, limit=4)
    assert [(batch["inputs"][:, 0] // 10).tolist() for batch in some] == [[12, 37], [62, 87], [112, 137], [162, 187]]
    assert len(evaluation(tokens, 2, 10, limit=1000)) == 100
    assert len(evaluation(tokens, 2, 10, limit=100)[1:3]) == 2
    np.testing.assert_array_equal(every[-1]["targets"], every[99]["targets"])


@pytest.mark.parametrize("stride", [0, 3])
def test_as_many_windows_are_the_same_ones_whatever_the_batch_size(stride: int) -> None:
    """Else arms of a study that differ in the batch size would be judged on different text."""

    def windows(batch_size: int, limit: int) -> dict[str, np.ndarray]:
        batches = list(evaluation(np.arange(1003), batch_size, 10, limit, stride))
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    expected = windows(1, 24)
    assert len(expected["inputs"]) == 24
    for batch_size in (2, 3, 8, 24):
        found = windows(batch_size, 24 // batch_size)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("size", [0, 1])
def test_evaluation_needs_two_tokens(size: int) -> None:
    with pytest.raises(DataError, match=f"split of {size} tokens has nothing to predict"):
        evaluation(np.arange(size), 1, 4)


# Prefetch


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("depth", [1, 2, 10])
def test_prefetch_gives_all_in_order(depth: int) -> None:
    with prefetch(lambda n: n * n, range(3, 8), depth) as items:
        assert list(items) == [9, 16, 25, 36, 49]
    with prefetch(lambda n: n, [], depth) as items:
        assert list(items) == []
    assert not prefetch_threads()


def test_prefetch_works_ahead() -> None:
    done: list[int] = []
    with prefetch(lambda n: done.append(n), range(10), depth=3) as items:
        next(items)
        deadline = time.monotonic() + 5
        while len(done) < 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert done == [0, 1, 2, 3], "three ahead of the one taken, and no more"


def test_prefetch_raises_in_its_place() -> None:
    def get(n: int) -> int:
        if n == 2:
            raise DataError("two")
        return n

    got = []
    with pytest.raises(DataError, match="two"), prefetch(get, range(5)) as items:
        for item in items:
            got.append(item)
    assert got == [0, 1] and not prefetch_threads()


def test_prefetch_stops_when_left_early() -> None:
    with pytest.raises(KeyboardInterrupt), prefetch(lambda n: n, itertools.count()) as items:
        next(items)
        raise KeyboardInterrupt
    assert not prefetch_threads()
