"""Token files that change or are damaged while they are in use: an error, never a SIGBUS or ids that can't be."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxlm import data
from jaxlm.data import tokenfile
from jaxlm.data.tokenizers import Bytes
from jaxlm.errors import DataError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    ids = np.random.default_rng(0).integers(0, 256, 50_000)
    return data.write_tokens(tmp_path / "my.bin", [ids], Bytes()).path


def batches(path: Path) -> data.Batches:
    return data.Batches(data.Windows(data.open_tokens(path).tokens, 32), 4, seed=0)


# Changed since it was opened


@pytest.mark.parametrize("left", [0, 50_000])
@pytest.mark.parametrize("reader", ["data.Batches(data.Windows(tokens, 32), 4, 0)", "data.evaluation(tokens, 4, 32)"])
def test_truncated_between_two_batches(path: Path, left: int, reader: str) -> None:
    """In a process of its own, which a SIGBUS would end."""
    code = (
        "import os, sys\n"
        "from jaxlm import data, errors\n"
        "tokens = data.open_tokens(sys.argv[1]).tokens\n"
        "def door():\n"
        f"    with data.prefetch({reader}.__getitem__, range(300), depth=1) as batches:\n"
        "        next(batches)\n"
        f"        os.truncate(sys.argv[1], {left})\n"
        "        list(batches)\n"
        "sys.exit(errors.exit_code(door))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == DataError.exit_code, done
    assert done.stderr == (
        f"error: {path} holds {left} bytes, and 100002 when it was opened: it was truncated or written to while in "
        "use; restore it and run again\n"
    )


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0\0")


def write_over(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[::-1])
    os.utime(path, (1, 1))  # the clock of the file system may be coarser than this test


@pytest.mark.parametrize(
    ("change", "message"),
    [(append, "my.bin holds 100004 bytes, and 100002 when it was opened"), (write_over, "my.bin is damaged: sha256")],
)
def test_written_to(path: Path, change: Callable[[Path], None], message: str) -> None:
    opened, split = batches(path), data.evaluation(data.open_tokens(path).tokens, 4, 32)
    _ = opened[0], split[0]
    change(path)
    for read in (opened, split):
        with pytest.raises(DataError, match=message):
            read[1]


def replace(path: Path) -> None:
    shutil.copy(path, path.with_name("new"))
    os.truncate(path.with_name("new"), 10)
    path.with_name("new").replace(path)


@pytest.mark.parametrize("change", [lambda path: os.utime(path, (1, 1)), replace, Path.unlink])
def test_a_file_that_is_touched_replaced_or_deleted_is_still_what_was_opened(
    path: Path, change: Callable[[Path], None]
) -> None:
    opened, expected = batches(path), batches(path)[1]
    change(path)
    for _ in range(2):
        np.testing.assert_array_equal(opened[1]["targets"], expected["targets"])


def test_a_file_is_closed_with_its_last_view(path: Path) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    opened = batches(path)
    assert len(os.listdir("/proc/self/fd")) > before
    del opened
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


# Damaged before it was opened, and too large to be hashed then


@pytest.mark.parametrize("position", [0, 12_345, 49_999])
def test_an_id_that_cannot_be_is_named(section, path: Path, position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenfile, "_HASHED", 100)
    raw = np.fromfile(path, "<u2")
    raw[position] = 60_000
    raw.tofile(path)
    message = f"my.bin is damaged: token id 60000 at position {position}; expected none above 256"
    opened = batches(path)
    with pytest.raises(DataError, match=message):
        for n in range(2 * opened.num_rows // opened.batch_size):  # an epoch leaves a few tokens out
            opened[n]
    with pytest.raises(DataError, match=message):
        list(data.evaluation(data.open_tokens(path).tokens, 4, 32))
    with pytest.raises(DataError, match=message):
        parted = data.open(section(path, validation="5%"))  # counts the bytes of the tail
        assert parted.validation is not None
        list(data.evaluation(parted.train.tokens, 4, 32))


def test_the_highest_id_is_none_of_those(path: Path) -> None:
    assert data.open_tokens(path).tokens.max() == data.open_tokens(path).max_id == 256
    opened = batches(path)
    opened.rows(0, opened.num_rows)
