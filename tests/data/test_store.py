from __future__ import annotations

import fcntl
import io
import json
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers as library
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from jaxlm import data, files
from jaxlm.data import cutting, encoding, heldout, store, tokenfile, tokenizer_specs
from jaxlm.data.tokenizers import Bytes, Chars
from jaxlm.errors import ConfigError, DataError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    top = tmp_path / "corpus"
    top.mkdir()
    for i in range(40):
        (top / f"{i:02}.txt").write_text(f"document {i} says: naïve café {'very ' * i}\n")
    return top


def documents(file: data.TokenFile, tokenizer: data.Tokenizer) -> list[str]:
    ends = np.flatnonzero(file.tokens == tokenizer.end_of_text)
    assert ends[-1] == file.num_tokens - 1, "the last document ends as well"
    return [tokenizer.decode(part) for part in np.split(file.tokens, ends[:-1] + 1)]


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "tokens").iterdir())


# From text, by way of the cache


@pytest.mark.parametrize("spec", ["bytes", "chars", "bpe:300"])
def test_text_to_tokens(section, corpus: Path, spec: str) -> None:
    opened = data.open(section(corpus, validation="20%", tokenizer=spec))
    assert opened.validation is not None
    train, held = (documents(file, opened.tokenizer) for file in (opened.train, opened.validation))
    assert sorted(train + held) == sorted(path.read_text() for path in corpus.iterdir()) and len(held) >= 2
    for file, texts in ((opened.train, train), (opened.validation, held)):
        assert file.num_documents == len(texts)
        assert file.num_bytes == sum(len(text.encode()) for text in texts)
        assert file.num_tokens == len(file.tokens) and file.max_id >= file.tokens.max()
        assert file.vocab_size == opened.tokenizer.vocab_size and file.dtype == np.uint16
        assert file.tokenizer == opened.tokenizer.fingerprint
    assert opened.train.source != opened.validation.source


def test_second_time_is_from_the_cache(section, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = section(corpus, validation="20%", tokenizer="bpe:300")
    first = data.open(wanted)
    monkeypatch.setattr(tokenizer_specs, "build", lambda *args: pytest.fail("trained again"))
    second = data.open(wanted)
    np.testing.assert_array_equal(first.train.tokens, second.train.tokens)
    assert first.tokenizer == second.tokenizer and len(entries(tmp_path)) == 1
    assert sorted(path.name for path in entries(tmp_path)[0].iterdir()) == [
        *("train.bin", "train.json", "validation.bin", "validation.json")
    ]


def test_whatever_shapes_the_tokens_is_in_the_key(section, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("other")
    tok = tmp_path / "tok"
    tok.mkdir()
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"text": "a", "body": "b"}')
    wanted = [
        section(corpus),
        section(corpus, validation="5%"),
        section(corpus, validation="10%"),
        section(corpus, validation=other),
        section(corpus, tokenizer="chars"),
        section(corpus, tokenizer="bpe:260"),
        section(corpus, errors="replace"),
        section(rows),
        section(rows, text_field="body"),
    ]
    for each in wanted:
        data.open(each)
    assert len(entries(tmp_path)) == len(wanted)
    data.open(section(corpus, validation="5.0%"))
    assert len(entries(tmp_path)) == len(wanted)
    (corpus / "00.txt").write_text("changed")
    assert "changed" in documents(data.open(section(corpus)).train, Bytes())


def test_validation_of_its_own(section, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Ωmega is a character of validation only")
    opened = data.open(section(corpus, validation=other, tokenizer="chars"))
    assert opened.validation is not None
    assert documents(opened.validation, opened.tokenizer) == [other.read_text()]
    assert opened.train.num_documents == 40


def test_bpe_learns_from_train_alone(section, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("zzzzqqqq " * 1000)
    alone = data.open(section(corpus, tokenizer="bpe:280"))
    assert data.open(section(corpus, validation=other, tokenizer="bpe:280")).tokenizer == alone.tokenizer


def test_one_document_is_cut(section, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("0123456789" * 10)
    opened = data.open(section(path, validation="10%"))
    assert opened.validation is not None
    assert documents(opened.train, Bytes()) == ["0123456789" * 9]
    assert documents(opened.validation, Bytes()) == ["0123456789"]


def test_stdlib(section) -> None:
    opened = data.open(section("stdlib", validation="5%"))
    assert opened.validation is not None
    assert opened.validation.num_bytes / (opened.train.num_bytes + opened.validation.num_bytes) == pytest.approx(
        0.05, abs=0.005
    )


@pytest.mark.parametrize("spec", ["bytes", "chars", "bpe:300"])
def test_long_documents_are_encoded_in_parts(
    section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("def f(x):\n    return x + 1\n\n\nclass Naïve:\n  pass\n" * 50)
    whole = data.open(section(path, tokenizer=spec))
    monkeypatch.setattr(cutting, "_PIECE", 100)
    monkeypatch.setattr(encoding, "_CHUNK", 250)
    parts = data.open(section(path, tokenizer=spec, cache_dir=tmp_path / "second"))
    np.testing.assert_array_equal(whole.train.tokens, parts.train.tokens)
    assert whole.train._replace(path=path, tokens=path) == parts.train._replace(path=path, tokens=path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("name", ["train.bin", "train.json", "validation.bin", "validation.json"])
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink, lambda path: path.write_bytes(b"")])
def test_damaged_cache_is_rebuilt(section, corpus: Path, tmp_path: Path, capsys, name: str, damage) -> None:
    wanted = section(corpus, validation="20%", tokenizer="chars")
    before = np.array(data.open(wanted).train.tokens)
    damage(entries(tmp_path)[0] / name)
    np.testing.assert_array_equal(data.open(wanted).train.tokens, before)
    warnings = capsys.readouterr().err.splitlines()
    # Without train.json an entry was never finished: nothing to warn of.
    assert len(warnings) == (0 if (name, damage) == ("train.json", Path.unlink) else 1)
    assert all(line.startswith("warning: rebuilding the cache entry") for line in warnings)
    data.open(wanted)
    assert capsys.readouterr().err == ""


def test_unwritable_cache(section, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(
        DataError, match=f"can't write the token cache {tmp_path}/file/tokens/.*data.cache_dir, or JAXLM_CACHE"
    ):
        data.open(section(corpus, cache_dir=tmp_path / "file"))


def test_failure_leaves_nothing_behind(section, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": 1}\n')
    with pytest.raises(DataError, match="line 2"):
        data.open(section(path))
    assert list(entries(tmp_path)[0].iterdir()) == []


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe:300"])
def test_a_table_that_grows_as_it_is_read_is_told(
    section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "row {i}"}}\n' for i in range(50)))
    split = heldout.split

    def before_a_write(*args):
        sides = split(*args)
        with path.open("a") as file:
            file.write('{"text": "written meanwhile"}\n')
        return sides

    monkeypatch.setattr(heldout, "split", before_a_write)
    with pytest.raises(DataError, match="^/.*a.jsonl has changed while it was read; run again when it is complete$"):
        data.open(section(path, validation="20%", tokenizer=tokenizer))


@pytest.mark.parametrize("validation", ["20%", "other.txt"])
def test_a_source_that_changes_as_it_is_read_is_not_cached(
    section, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, validation: str
) -> None:
    (tmp_path / "other.txt").write_text("other")
    monkeypatch.chdir(tmp_path)
    wanted, late = section(corpus, validation=validation), tmp_path / "late.txt"
    late.write_text("late")
    changed = Path(validation) if validation == "other.txt" else corpus / "07.txt"
    build = tokenizer_specs.build

    def after_a_write(*args):
        changed.write_text("written meanwhile")
        return build(*args)

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_specs, "build", after_a_write)
        with pytest.raises(DataError, match="has changed while it was read; run again"):
            data.open(wanted)
    assert not list((tmp_path / "cache").rglob("train.*"))

    encode = Bytes.encode
    monkeypatch.setattr(Bytes, "encode", lambda *args: (late.write_text("later"), encode(*args))[1])
    with pytest.raises(DataError, match="late.txt has changed while it was read"):
        store.tokenize(str(late), Bytes(), wanted)
    assert not list((tmp_path / "cache").rglob("text.*"))


def _open_in_process(args: tuple) -> tuple[str, str]:
    wanted, cache = args
    os.environ["JAXLM_CACHE"] = cache
    opened = data.open(wanted)
    return opened.train.sha256, opened.tokenizer.fingerprint


def test_two_processes_at_once(section, corpus: Path, tmp_path: Path) -> None:
    wanted = section(corpus, validation="20%", tokenizer="bpe:300")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.map(_open_in_process, [(wanted, str(tmp_path / "cache"))] * 4, chunksize=1)
    assert len(set(results)) == 1 and data.open(wanted).train.sha256 == results[0][0]
    assert len(list(entries(tmp_path)[0].iterdir())) == 4


def test_one_process_builds_an_entry_and_others_wait_for_it(
    section, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, build, builds, wait = section(corpus, validation="20%"), store._build, [], threading.Event()
    stderr = io.StringIO()  # capsys drops what another thread writes while it is asked
    monkeypatch.setattr("sys.stderr", stderr)

    def slow(*args):
        builds.append(args)
        wait.wait(10)
        build(*args)

    monkeypatch.setattr(store, "_build", slow)
    with ThreadPoolExecutor(2) as threads:
        opened = [threads.submit(data.open, wanted) for _ in range(2)]
        while not (builds and "waiting for another process" in stderr.getvalue()):
            assert not any(future.done() for future in opened)
        wait.set()
        assert len({future.result().train.sha256 for future in opened}) == 1
    assert len(builds) == 1

    def unlocked(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unlocked)
    other = section(corpus, validation="20%", tokenizer="chars")
    assert data.open(other).train.num_tokens and len(builds) == 2


def test_what_broken_builds_left_goes(section, corpus: Path, tmp_path: Path) -> None:
    data.open(section(corpus))
    [entry] = entries(tmp_path)
    left, fresh = entry / ".train.bin.1.ab.tmp", entry / ".train.bin.2.cd.tmp"
    for path in (left, fresh):
        path.write_bytes(b"gigabytes")
    os.utime(left, (0, 0))
    with files.locked(entry) as held:  # someone is at it
        data.open(section(corpus, tokenizer="chars"))
        assert held and left.exists()
    data.open(section(corpus, validation="20%"))
    assert fresh.exists() and not left.exists()


def test_a_refused_build_leaves_no_part_behind(
    section, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store, "_if_unchanged", lambda *args: iter([]))  # the last part is not written
        with pytest.raises(DataError, match="no tokens"):
            data.open(section(corpus, validation="20%"))
    [entry] = entries(tmp_path)
    assert list(entry.iterdir()) == []


def test_progress_is_for_terminals(section, corpus: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    data.open(section(corpus, tokenizer="chars"), progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    data.open(section(corpus, tokenizer="chars", validation="5%"), progress=True)
    assert "tokenizing train" in capsys.readouterr().err


# Token files of the user's own


@pytest.fixture
def token_file(tmp_path: Path) -> data.TokenFile:
    ids = [np.frombuffer(f"document {i}".encode(), np.uint8) for i in range(100)]
    return data.write_tokens(tmp_path / "my.bin", ids, Bytes())


def test_write_and_open(token_file: data.TokenFile) -> None:
    assert documents(token_file, Bytes()) == [f"document {i}" for i in range(100)]
    assert (token_file.num_documents, token_file.num_bytes, token_file.max_id) == (100, 1090, 256)
    assert token_file.num_tokens == 1190 and token_file.dtype == np.dtype("<u2")
    assert data.tokenizer_of(token_file.path) == Bytes()
    data.verify(token_file)
    meta = json.loads(token_file.path.with_suffix(".json").read_text())
    assert meta["num_tokens"] == 1190 and meta["dtype"] == "uint16"


def test_a_token_file_may_lie_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = data.write_tokens("~/a.bin", [np.array([1, 2])], Bytes())
    assert file.path == tmp_path / "a.bin" and data.open_tokens("~/a.bin").sha256 == file.sha256


def test_end_of_text_is_added_once(tmp_path: Path) -> None:
    file = data.write_tokens(tmp_path / "a.bin", [np.array([1, 2, 256]), np.array([3]), np.array([])], Bytes())
    assert file.tokens.tolist() == [1, 2, 256, 3, 256, 256] and file.num_documents == 3


def test_documents_are_counted_by_their_ends(section, tmp_path: Path) -> None:
    """An array may hold many: once it counted as one, and a part of the file as fewer than none."""
    file = data.write_tokens(tmp_path / "a.bin", [np.array([1, 256] * 50)], Bytes())
    opened = data.open(section(file.path, validation="20%"))
    assert opened.validation is not None
    assert [part.num_documents for part in (file, opened.train, opened.validation)] == [50, 40, 10]


def test_four_byte_tokens(tmp_path: Path) -> None:
    tokenizer = Chars("".join(chr(0x10000 + i) for i in range(70_000)))
    file = data.write_tokens(tmp_path / "a.bin", [np.array([1, 69_999])], tokenizer)
    assert file.dtype == np.uint32 and file.tokens.tolist() == [1, 69_999, 70_000]
    assert file.path.stat().st_size == 12


@pytest.mark.parametrize("ids", [[257], [-1], [65_536 + 5], [2**40]])
def test_ids_never_wrap(tmp_path: Path, ids: list[int]) -> None:
    with pytest.raises(DataError, match=f"token id {ids[0]} is outside of the tokenizer's vocabulary of 257"):
        data.write_tokens(tmp_path / "a.bin", [np.array(ids)], Bytes())
    assert list(tmp_path.iterdir()) == []


def test_ids_are_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once they took 13 bytes a token, of a file that was mapped."""
    ids = np.random.default_rng(0).integers(0, 257, 1000).astype(np.uint16)
    whole = data.write_tokens(tmp_path / "whole.bin", [ids], Bytes())
    sizes, chunk = [], tokenfile._chunk
    monkeypatch.setattr(tokenfile, "_PART", 64)
    monkeypatch.setattr(tokenfile, "_chunk", lambda part, *args: sizes.append(len(part)) or chunk(part, *args))
    parts = data.write_tokens(tmp_path / "parts.bin", [ids], Bytes())
    assert parts._replace(path=whole.path, tokens=whole.tokens) == whole and max(sizes) == 64


def raw_ids(path: Path, tokenizer: data.Tokenizer, texts: list[str]) -> Path:
    """As nanoGPT writes them."""
    ids = [*map(tokenizer.encode, texts)]
    np.concatenate([np.append(x, tokenizer.end_of_text) for x in ids]).astype(tokenizer.dtype).tofile(path)
    return path


def test_ids_without_metadata_are_read_with_the_tokenizer_that_made_them(section, tmp_path: Path) -> None:
    bpe = tokenizer_specs.build("bpe:300", ["the cat sat on the mat " * 50])
    (tmp_path / "tokenizer.json").write_text(bpe.to_json())
    texts = [f"the cat sat {i}" for i in range(50)]
    train, val = (raw_ids(tmp_path / f"{name}.bin", bpe, texts) for name in ("train", "val"))
    fields = {"tokenizer": str(tmp_path / "tokenizer.json")}
    opened = data.open(section(train, validation=val, **fields))
    ours = data.write_tokens(tmp_path / "ours.bin", [opened.train.tokens], bpe)
    assert opened.train._replace(path=ours.path, tokens=ours.tokens) == ours and opened.tokenizer == bpe
    assert opened.validation is not None and opened.validation.num_documents == 50
    assert documents(opened.train, bpe) == texts and not train.with_suffix(".json").exists()
    parted = data.open(section(train, validation="10%", **fields))
    assert parted.validation is not None and (parted.train.num_documents, parted.validation.num_documents) == (45, 5)
    assert data.tokenize(str(val), bpe, section("")).num_documents == 50

    for spec in ("bytes", "bpe:300"):
        with pytest.raises(DataError, match=r"no metadata train.json next to it: .*let data.tokenizer .* gpt2$"):
            data.open(section(train, tokenizer=spec))
    np.array([1, 300], "<u2").tofile(val)
    with pytest.raises(DataError, match="val.bin has no metadata, and is not uint16 ids of .* id 300 is outside"):
        data.open(section(train, validation=val, **fields))
    val.write_bytes(b"abc")
    with pytest.raises(DataError, match="val.bin holds 3 bytes; expected token ids of 2 bytes"):
        data.open(section(train, validation=val, **fields))
    (tmp_path / "meta.pkl").write_bytes(b"")
    for spec in ("bytes", fields["tokenizer"]):
        with pytest.raises(DataError, match=r"its ids are of characters: give the text .* data.tokenizer=chars$"):
            data.open(section(train, tokenizer=spec))


def test_bad_writes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="float64; expected integers"):
        data.write_tokens(tmp_path / "a.bin", [np.array([1.5])], Bytes())
    with pytest.raises(DataError, match="document 0 is a single number; expected a list of documents, each an array"):
        data.write_tokens(tmp_path / "a.bin", np.array([1, 2]), Bytes())
    with pytest.raises(DataError, match=r"document 1 is an array of shape \(2, 5\); expected a list of documents"):
        data.write_tokens(tmp_path / "a.bin", [np.array([1]), np.zeros((2, 5), int)], Bytes())
    with pytest.raises(DataError, match="no tokens to write"):
        data.write_tokens(tmp_path / "a.bin", [], Bytes())
    with pytest.raises(DataError, match="must be named NAME.bin"):
        data.write_tokens(tmp_path / "a.npy", [np.array([1])], Bytes())
    with pytest.raises(DataError, match="can't write .*none/a.bin: No such file"):
        data.write_tokens(tmp_path / "none/a.bin", [np.array([1])], Bytes())


def test_damaged_file_is_an_error(token_file: data.TokenFile) -> None:
    path = token_file.path
    raw = path.read_bytes()
    path.write_bytes(raw[:-2])
    with pytest.raises(DataError, match="my.bin holds 2378 bytes; its metadata .*my.json says 1190 tokens of 2 bytes"):
        data.open_tokens(path)
    path.write_bytes(raw + b"\0\0")
    with pytest.raises(DataError, match="holds 2382 bytes"):
        data.open_tokens(path)
    path.write_bytes(b"\1" + raw[1:])
    with pytest.raises(DataError, match="my.bin is damaged: sha256"):
        data.open_tokens(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="my.bin holds 0 bytes"):
        data.open_tokens(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(DataError, match="has no metadata my.json next to it: write it with jaxlm.data.write_tokens"):
        data.open_tokens(path)
    path.unlink()
    with pytest.raises(DataError, match="no such file"):
        data.open_tokens(path)


def test_large_files_are_checked_by_size_and_on_demand(
    token_file: data.TokenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenfile, "_HASHED", 100)
    flip(token_file.path)
    damaged = data.open_tokens(token_file.path)
    with pytest.raises(DataError, match="damaged"):
        data.verify(damaged)


def test_damaged_metadata_is_an_error(section, token_file: data.TokenFile) -> None:
    path = token_file.path.with_suffix(".json")
    meta = json.loads(path.read_text())
    for content, message in [
        ({**meta, "num_bytes": meta["num_bytes"] + 1}, "my.json is damaged, or was edited"),
        ({**meta, "format": "other"}, "not metadata of a token file"),
        ([], "not metadata of a token file"),
    ]:
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match=message):
            data.open(section(token_file.path))
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="can't read the metadata"):
        data.open(section(token_file.path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)
FIELDS = ("format", "dtype", "num_tokens", "num_bytes", "num_documents", "max_id", "vocab_size", "sha256")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    given_fields=st.dictionaries(st.sampled_from([*FIELDS, "tokenizer", "source", "tokenizer_json"]), JSON, min_size=1)
)
def test_crafted_metadata_is_an_error(section, token_file: data.TokenFile, given_fields: dict[str, object]) -> None:
    """Its own check fits, as a stranger can make it fit."""
    path = token_file.path.with_suffix(".json")
    whole = path.read_bytes()
    meta = {name: value for name, value in json.loads(whole).items() if name != "check"} | given_fields
    path.write_text(json.dumps({**meta, "check": files.seal(meta)}))
    try:
        opened = data.open(section(token_file.path))
    except DataError as error:
        assert "my." in str(error) and "\n" not in str(error)
    else:
        assert opened.tokenizer == Bytes() and opened.train.max_id < 257
    finally:
        path.write_bytes(whole)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10_000), junk=st.binary(min_size=1, max_size=3), cut=st.booleans())
def test_damaged_bytes_of_metadata_are_an_error(token_file: data.TokenFile, at: int, junk: bytes, cut: bool) -> None:
    path = token_file.path.with_suffix(".json")
    whole = path.read_bytes()
    at %= len(whole)
    path.write_bytes(whole[:at] + junk + (b"" if cut else whole[at + len(junk) :]))
    try:
        opened = data.open_tokens(token_file.path)
    except DataError as error:
        assert "my.json" in str(error) and "\n" not in str(error)
    else:
        assert opened._replace(tokens=token_file.tokens) == token_file, "only what means nothing in JSON has changed"
    finally:
        path.write_bytes(whole)


def test_token_file_as_source(section, token_file: data.TokenFile, tmp_path: Path) -> None:
    opened = data.open(section(token_file.path))
    assert opened.tokenizer == Bytes() and opened.validation is None
    np.testing.assert_array_equal(opened.train.tokens, token_file.tokens)
    assert not (tmp_path / "cache").exists()

    other = data.write_tokens(tmp_path / "other.bin", [np.array([1, 2])], Bytes())
    opened = data.open(section(token_file.path, validation=other.path))
    assert opened.validation is not None and opened.validation.tokens.tolist() == [1, 2, 256]


@pytest.mark.parametrize("share", ["0.1%", "5%", "50%", "99.9%"])
def test_tail_of_a_token_file_is_whole_documents(section, token_file: data.TokenFile, share: str) -> None:
    opened = data.open(section(token_file.path, validation=share))
    train, held = opened.train, opened.validation
    assert held is not None
    np.testing.assert_array_equal(np.concatenate([train.tokens, held.tokens]), token_file.tokens)
    assert held.num_tokens / token_file.num_tokens == pytest.approx(float(share[:-1]) / 100, abs=0.01)
    for file in (train, held):
        assert file.num_documents == np.count_nonzero(file.tokens == 256)
        assert file.num_bytes == np.count_nonzero(file.tokens != 256)
    if share in ("5%", "50%"):
        assert train.tokens[-1] == 256 and documents(held, Bytes())[0].startswith("document ")
    assert len({train.sha256, held.sha256, token_file.sha256}) == 3


def test_tail_without_a_document_end_near(section, tmp_path: Path) -> None:
    data.write_tokens(tmp_path / "a.bin", [np.zeros(999, np.int64)], Bytes())
    opened = data.open(section(tmp_path / "a.bin", validation="10%"))
    assert opened.validation is not None and (opened.train.num_tokens, opened.validation.num_tokens) == (900, 100)
    assert (opened.train.num_bytes, opened.validation.num_bytes) == (900, 99)
    data.write_tokens(tmp_path / "a.bin", [np.array([], int)], Bytes())
    with pytest.raises(DataError, match="nothing to hold out"):
        data.open(section(tmp_path / "a.bin", validation="10%"))


def test_token_file_brings_its_tokenizer(section, tmp_path: Path) -> None:
    bpe = tokenizer_specs.build("bpe:300", ["the cat sat on the mat " * 50])
    file = data.write_tokens(tmp_path / "a.bin", bpe.encode_batch(["the cat", "the mat"]), bpe)
    assert file.num_bytes == 14
    assert data.open(section(file.path)).tokenizer == bpe
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(bpe.to_json())["tokenizer"]))
    assert data.open(section(file.path, tokenizer=tmp_path / "tokenizer.json")).tokenizer == bpe
    for spec in ("chars", "bpe:300"):
        with pytest.raises(DataError, match=f"data.tokenizer='{spec}' is not the tokenizer that made .*a.bin"):
            data.open(section(file.path, tokenizer=spec))
    other = tokenizer_specs.build("bpe:290", ["the dog"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(other.to_json())["tokenizer"]))
    with pytest.raises(DataError, match="leave data.tokenizer at 'bytes'"):
        data.open(section(file.path, tokenizer=tmp_path / "tokenizer.json"))


def test_sources_that_do_not_mix(section, token_file: data.TokenFile, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a token file, data.source=.* is text"):
        data.open(section(corpus, validation=token_file.path))
    with pytest.raises(ConfigError, match="with a token file as data.source expected a share"):
        data.open(section(token_file.path, validation=corpus))
    with pytest.raises(ConfigError, match="expected more than 0%"):
        data.open(section(token_file.path, validation="0%"))
    other = data.write_tokens(tmp_path / "other.bin", [np.array([0])], Chars("a"))
    with pytest.raises(DataError, match="made by different tokenizers"):
        data.open(section(token_file.path, validation=other.path))


def test_several_token_files_are_no_source(section, token_file: data.TokenFile, tmp_path: Path) -> None:
    one, many = token_file.path, tmp_path / "many"
    many.mkdir()
    for name in ("a", "b"):
        for suffix in (".bin", ".json"):
            (many / name).with_suffix(suffix).write_bytes(one.with_suffix(suffix).read_bytes())
    for spec in (f"{many}/*.bin", str(many)):
        with pytest.raises(DataError, match=r"holds token files \(2: .*a.bin, .*b.bin\).*name it, or join them"):
            data.open(section(source=spec))
    paths = sorted(many.glob("*.bin"))
    joined = data.write_tokens(
        tmp_path / "all.bin", [data.open_tokens(path).tokens for path in paths], data.tokenizer_of(paths[0])
    )
    assert joined.num_documents == 2 * token_file.num_documents and joined.num_tokens == 2 * token_file.num_tokens


def test_a_folder_by_the_name_of_a_token_file_is_none(section, tmp_path: Path) -> None:
    (tmp_path / "dir.bin").mkdir()
    with pytest.raises(DataError, match="^/.*/dir.bin is a folder; a token file is expected$"):
        data.open(section(tmp_path / "dir.bin"))


def test_what_a_folder_leaves_out_is_told_once(section, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "a.txt").write_text("some text")
    (tmp_path / "some" / "b.zst").write_bytes(b"")
    for _ in range(2):
        data.open(section(source=str(tmp_path / "some"), validation=""))
    assert capsys.readouterr().err.count("other suffixes were left out: 1 (.zst 1)") == 1


def test_an_unknown_character_is_told_with_its_document_and_place(
    section, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chars = tokenizer_specs.build("chars", (path.read_text() for path in corpus.iterdir()))
    (corpus / "07.txt").write_text("document " * 50 + "Ω")
    with pytest.raises(DataError, match="^07.txt: character 'Ω' at position 450 is not among the"):
        store.tokenize(str(corpus), chars, section(corpus))
    monkeypatch.setattr(cutting, "_PIECE", 100)
    monkeypatch.setattr(encoding, "_CHUNK", 250)
    with pytest.raises(DataError, match="^07.txt: character 'Ω' at position 450 is not among the"):
        store.tokenize(str(corpus), chars, section(corpus))


@pytest.mark.parametrize("format", ["text", "pairs"])
def test_a_word_that_is_the_end_of_text_is_told_with_its_document(section, tmp_path: Path, format: str) -> None:
    """It ended a document within, or a prompt, and nothing was said."""
    words = models.WordLevel({"<unk>": 0, "one": 1, "two": 2, "</s>": 3}, unk_token="<unk>")
    live = library.Tokenizer(words)
    live.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    live.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    rows = [{"text": "one two", "a": "two"}, {"text": "two", "a": "one </s> two"}]
    if format == "text":
        rows = [{"text": "one two"}, {"text": "one </s> two"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"format": format, "prompt": "{text}", "completion": "{a}"}
    wanted = section(tmp_path / "rows.jsonl", tokenizer=tmp_path, **fields)
    with pytest.raises(DataError, match="^rows.jsonl:2: the text holds what the tokenizer takes for its end of"):
        data.open(wanted)
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]))
    assert data.open(wanted).train.num_documents == 1


def test_a_cached_file_can_be_a_source(section, corpus: Path, tmp_path: Path) -> None:
    cached = data.open(section(corpus, tokenizer="chars"))
    again = data.open(section(cached.train.path))
    assert again.tokenizer == cached.tokenizer
    np.testing.assert_array_equal(again.train.tokens, cached.train.tokens)


def test_other_text_is_tokenized_by_the_given_tokenizer_and_cached(section, tmp_path: Path, corpus: Path) -> None:
    section = section(corpus)
    (tmp_path / "other.txt").write_text("héllo")
    file = store.tokenize(str(tmp_path / "other.txt"), Bytes(), section)
    assert bytes(file.tokens[:-1].astype(np.uint8)).decode() == "héllo"
    assert (int(file.tokens[-1]), file.num_bytes, file.num_documents) == (256, 6, 1)
    assert store.tokenize(str(tmp_path / "other.txt"), Bytes(), section).path == file.path
    assert store.tokenize(str(file.path), Bytes(), section).sha256 == file.sha256
    with pytest.raises(DataError, match="another tokenizer"):
        store.tokenize(str(file.path), Chars("abc"), section)
