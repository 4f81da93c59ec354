"""The held-out part: whole documents or a tail, about the share that was asked for, the same each time."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm import data
from jaxlm.data import Document, Source, heldout
from jaxlm.errors import ConfigError, DataError


def source(texts: dict[str, str]) -> Source:
    documents = [Document(name, text) for name, text in texts.items()]
    return Source("a source", "its fingerprint", sum(len(d.text.encode()) for d in documents), lambda: iter(documents))


@pytest.mark.parametrize(
    ("spec", "value"), [("5%", 0.05), ("0.5%", 0.005), (" 99% ", 0.99), ("", None), ("x.txt", None)]
)
def test_share(spec: str, value: float | None) -> None:
    assert heldout.share(spec) == (None if value is None else pytest.approx(value))


@pytest.mark.parametrize("spec", ["0%", "100%", "-5%", "five%", "%", "nan%", "inf%"])
def test_bad_share(spec: str) -> None:
    with pytest.raises(ConfigError, match="expected more than 0% and less than 100%"):
        heldout.share(spec)


def test_split_holds_out_whole_documents() -> None:
    texts = {f"{i:03}.txt": f"{i} " * (i % 7 + 1) for i in range(300)}
    whole = source(texts)
    train, held = (list(part.read()) for part in heldout.split(whole, 0.1))
    assert sorted(train + held) == sorted(whole.read()) and not set(train) & set(held)
    assert sum(len(d.text) for d in held) / sum(len(d.text) for d in train + held) == pytest.approx(0.1, abs=0.01)
    again = [list(part.read()) for part in heldout.split(source(texts), 0.1)]
    assert [train, held] == again
    # Neither the first nor the last ones, but spread.
    assert 90 < np.mean([int(d.name[:3]) for d in held]) < 210

    held_now = set(heldout.split(source({**texts, "new.txt": "new"}), 0.1)[1].read())
    assert len(held_now & set(held)) >= len(held) - 1, "a new document leaves the others where they were"


def test_equal_documents_are_on_one_side() -> None:
    texts = {f"{i:03}.txt": f"{i % 40} " * (i % 40 % 7 + 1) for i in range(300)}
    train, held = ({d.text for d in part.read()} for part in heldout.split(source(texts), 0.1))
    assert train and held and not train & held
    sizes = [part.num_bytes for part in heldout.split(source(texts), 0.1)]
    assert sizes[1] / sum(sizes) == pytest.approx(0.1, abs=0.03)
    with pytest.raises(DataError, match="all 3 documents of a source are equal: nothing to hold out; set data.valid"):
        heldout.split(source(dict.fromkeys("abc", "same")), 0.1)


def test_split_counts_and_names_its_sides() -> None:
    whole = source({"a.txt": "é" * 90, "b.txt": "b" * 20})
    train, held = heldout.split(whole, 0.1)
    assert (train.num_bytes, held.num_bytes) == (180, 20)
    assert len({whole.fingerprint, train.fingerprint, held.fingerprint, heldout.split(whole, 0.2)[1].fingerprint}) == 4


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=50), st.floats(0.001, 0.999), st.integers(0, 2**32))
def test_held_out_leaves_a_document_on_each_side(sizes: list[int], share: float, seed: int) -> None:
    hashes = np.random.default_rng(seed).integers(0, 2**63, len(sizes), np.uint64)
    held = heldout._held_out(hashes, np.array(sizes), share)
    assert 0 < held.sum() < len(sizes)


def test_one_huge_document_is_not_held_out() -> None:
    for seed in range(20):
        hashes = np.random.default_rng(seed).integers(0, 2**63, 11, np.uint64)
        held = heldout._held_out(hashes, np.array([10**6] + [5_000] * 10), 0.02)
        assert not held[0] and held.sum() == 4


def test_a_share_is_not_the_larger_part() -> None:
    """A README beside one book: 5% of both is nearer to the book."""
    assert heldout._held_out(np.arange(2, dtype=np.uint64), np.array([1_000, 10**6]), 0.05).tolist() == [True, False]
    assert heldout._held_out(np.arange(3, dtype=np.uint64), np.array([0, 0, 100]), 0.05)[2] == False  # noqa: E712


def before(hashes: np.ndarray, sizes: np.ndarray, share: float) -> np.ndarray:
    """What was held out before a share that is missed by far was mended; what studies have published depends on it."""
    target = share * sizes.sum()
    order = np.argsort(hashes, kind="stable")
    order = order[sizes[order] <= target]
    if not len(order):
        order = np.array([np.argmin(sizes)])
    count = int(np.argmin(np.abs(np.cumsum(sizes[order]) - target))) + 1
    held = np.zeros(len(sizes), bool)
    held[order[: min(count, len(sizes) - 1)]] = True
    return held


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=50), st.floats(0.001, 0.999), st.integers(0, 2**32))
def test_a_choice_within_a_factor_of_two_stays_and_another_gets_nearer(
    given_sizes: list[int], share: float, seed: int
) -> None:
    sizes = np.array(given_sizes)
    hashes = np.random.default_rng(seed).integers(0, 2**63, len(sizes), np.uint64)
    was, now = (choose(hashes, sizes, share) for choose in (before, heldout._held_out))
    off = [max(ratio, 1 / ratio) for ratio in (sizes[held].sum() / (share * sizes.sum()) for held in (was, now))]
    assert off[1] <= off[0]
    if off[0] <= 2:
        np.testing.assert_array_equal(was, now)


@pytest.mark.parametrize(
    ("sizes", "share", "size"),
    [
        ([100_000] * 12 + [14], 0.05, 100_000),  # books and a README: that alone was held out
        ([50, *[1000] * 11], 0.05, 1000),
        ([100, 900], 0.95, 900),
        ([100, 100, 100, 1], 0.05, 100),
        ([1000, 1000], 0.05, 1000),  # nothing is near
        ([10_000, 1000, 30], 0.01, 30),
    ],
)
def test_a_share_is_not_missed_by_far_where_a_document_is_near(sizes: list[int], share: float, size: int) -> None:
    for seed in range(20):
        hashes = np.random.default_rng(seed).integers(0, 2**63, len(sizes), np.uint64)
        assert np.array(sizes)[heldout._held_out(hashes, np.array(sizes), share)].sum() == size


def test_a_share_that_is_missed_by_far_is_told() -> None:
    assert heldout.warning("5%", 50, 100).startswith("warning: data.validation='5%' was asked for and 50.00% of the te")
    assert "0.01% of the text is held out" in heldout.warning("5%", 1, 10_000)
    assert [heldout.warning(*given) for given in (("5%", 10, 100), ("5%", 3, 100), ("a.txt", 1, 2))] == ["", "", ""]


def test_tail_of_a_single_document_is_held_out() -> None:
    train, held = heldout.split(source({"a.txt": "0123456789" * 10}), 0.05)
    assert [d.text[-3:] for d in train.read()] == ["234"] and [d.text for d in held.read()] == ["56789"]
    assert [[d.text for d in part.read()] for part in heldout.split(source({"a.txt": "ab"}), 0.05)] == [["a"], ["b"]]
    with pytest.raises(DataError, match="nothing to hold out"):
        heldout.split(source({"a.txt": "a"}), 0.05)


@pytest.mark.parametrize("then", [4, 6])
def test_a_source_that_grows_or_shrinks_as_it_is_read_is_told(then: int) -> None:
    counts = iter([5, then])
    growing = Source("a source", "", 0, lambda: (Document(str(i), f"text {i}") for i in range(next(counts))))
    train, _ = heldout.split(growing, 0.2)
    with pytest.raises(DataError, match="^a source has changed while it was read; run again when it is complete$"):
        list(train.read())


@pytest.mark.parametrize(("given", "meant"), [("0.05", "5%"), ("5", "5%"), ("12.5", "12.5%")])
def test_a_share_without_its_sign_is_asked_about(
    given: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"data.validation is '{given}', no file; .*: '{meant}'"):
        heldout.share(given)
    (tmp_path / given).touch()
    assert heldout.share(given) is None


def write(top: Path, files: dict[str, str]) -> Path:
    top.mkdir()
    for name, text in files.items():
        (top / name).write_text(text)
    return top


@pytest.mark.parametrize("spec", ["rows", "rows/*.txt"])
def test_a_file_of_the_source_is_no_validation(
    spec: str, section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was trained on, and nothing was said."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows", {"train.txt": "train", "val.txt": "validation", "none.txt": ""})
    (tmp_path / "copy.txt").write_text("validation")
    for held in ("rows/val.txt", "copy.txt"):
        message = rf"data.validation='{held}' would be trained on: its {held} is in data.source='{re.escape(spec)}' as"
        with pytest.raises(ConfigError, match=message + ".*name them one by one, or hold"):
            data.open(section(spec, validation=held))
    with pytest.raises(ConfigError, match=r"as well \(2 such files\);"):
        write(tmp_path / "larger", {"train.txt": "train", "more.txt": "more", "val.txt": "validation"})
        data.open(section("larger", validation="rows"))


def test_a_file_that_two_projects_share_is_told(section, tmp_path: Path, capsys) -> None:
    one = write(tmp_path / "one", {"a.txt": "a" * 90, "LICENSE.txt": "free"})
    other = write(tmp_path / "other", {"b.txt": "b" * 90, "LICENSE.txt": "free"})
    data.open(section(one, validation=other))
    assert re.search("warning: some of data.validation=.*LICENSE.txt is in data.source=", capsys.readouterr().err)


def test_files_that_are_apart_or_all_the_same_may_be_held_out(section, tmp_path: Path) -> None:
    one = write(tmp_path / "one", {"a.txt": "a", "none.txt": ""})
    other = write(tmp_path / "other", {"b.txt": "b", "none.txt": ""})
    same = write(tmp_path / "same", {"a.txt": "a"})
    for held in (other, one, same):
        opened = data.open(section(one, validation=held))
        assert opened.validation is not None and opened.validation.num_documents == 1


def test_made_rows_are_held_out_for_made_rows_of_their_kind_only(section) -> None:
    made = "jaxlm.data.made:sentiment"
    heldout.check_made(made, f"{made}_held_out")
    heldout.check_made("own.csv", "5%")
    for source in ("own.csv", "jaxlm.data.made:translation"):
        with pytest.raises(ConfigError, match=f"data.source is '{source}'.*set data.validation to a share of yours"):
            data.open(section(source, validation=f"{made}_held_out", format="pairs"))
