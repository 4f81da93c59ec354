"""Suite `data`: text to tokens, and tokens to batches. On the host, in this process, one side after the other."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.bench import machine
from experiments.bench.report import Limit, Row, single
from experiments.bench.timing import Spread, interleave
from jaxlm import config, data
from jaxlm.data import tokenizer_specs, tokenizers

B, T = 64, 256


def run(quick: bool) -> list[Row]:
    texts = [document.text for document in data.open_source("stdlib").read()]
    if quick:
        texts = texts[:40]
    rounds = 3 if quick else 7
    return [*_tokenizing(texts, rounds), *_to_file(rounds, quick), *_batches(rounds, 40 if quick else 400)]


def _tokenizing(texts: list[str], rounds: int) -> list[Row]:
    """Encoding of texts that are in memory, in MB of UTF-8 per second."""
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    rows = []
    for spec in ("bytes", "chars", "bpe:2048"):
        begin = time.perf_counter()
        tokenizer = tokenizer_specs.build(spec, texts)
        built = time.perf_counter() - begin
        machine.say(f"{spec}: {megabytes:.1f} MB")
        sides: dict[str, Callable[[], object]] = {"jaxlm": lambda: tokenizer.encode_batch(texts)}  # noqa: B023
        peer = ""
        if isinstance(tokenizer, tokenizers.Chars):
            peer = "nanoGPT's dict, a character at a time"
            known = {character: i for i, character in enumerate(tokenizer.characters)}
            sides[peer] = lambda: [np.array([known[c] for c in text], np.uint16) for text in texts]  # noqa: B023
        elif isinstance(tokenizer, tokenizers.HuggingFace):
            import tokenizers as library

            peer = "the tokenizers library, bare"
            bare = library.Tokenizer.from_str(tokenizer.tokenizer_json)
            sides[peer] = lambda: [x.ids for x in bare.encode_batch_fast(texts, add_special_tokens=False)]  # noqa: B023
        speeds = _speeds(sides, megabytes, rounds)
        limit = Limit("value", ">=", 5) if spec == "bytes" else None
        rows.append(Row("data", f"encoding, {spec}", "MB/s", speeds["jaxlm"], peer, speeds.get(peer), limit))
        if spec != "bytes":
            rows.append(Row("data", f"building {spec} from {megabytes:.1f} MB", "s", single(built)))
    return rows


def _to_file(rounds: int, quick: bool) -> list[Row]:
    """All that stands between a source and its first token: reading, hashing, splitting, encoding, writing."""
    machine.say("bytes, from source to token file")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "text"
        source.mkdir()
        size = 0
        for i, document in enumerate(data.open_source("stdlib").read()):
            size += (source / f"{i}.py").write_bytes(document.text.encode())
            if quick and i > 40:
                break
        section = config.default().data
        section.source = str(source)
        caches = itertools.count()

        def once() -> object:
            section.cache_dir = f"{folder}/{next(caches)}"
            return data.open(section)

        found = _speeds({"jaxlm": once}, size / 1e6, rounds)["jaxlm"]
    limit = Limit("value", ">=", 5)
    return [Row("data", "from files to a checked token file, bytes", "MB/s", found, limit=limit)]


def _batches(rounds: int, count: int) -> list[Row]:
    """Batches of B x T from a mapped file of uint16, in millions of training tokens per second."""
    machine.say(f"batches of {B} x {T}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        ids = np.random.default_rng(0).integers(0, 256, 2**24, dtype=np.uint16)
        file = data.write_tokens(path, [ids], tokenizers.Bytes())
        batches = data.Batches(data.Windows(file.tokens, T), B, seed=0)
        position = itertools.count()
        sides: dict[str, Callable[[], object]] = {"jaxlm": lambda: [batches[next(position)] for _ in range(count)]}
        peer = ""
        if machine.has("torch"):
            peer = "nanoGPT's way, torch.stack of slices"
            sides[peer] = lambda: [_random_slices(path) for _ in range(count)]
        speeds = _speeds(sides, count * B * T / 1e6, rounds)
    limit = Limit("value", ">=", 20)
    return [Row("data", f"batches of {B} x {T}", "M tokens/s", speeds["jaxlm"], peer, speeds.get(peer), limit)]


def _random_slices(path: Path) -> object:
    """A batch as nanoGPT makes it: the file mapped anew, windows at random places, as int64."""
    import torch

    tokens = np.memmap(path, np.uint16, mode="r")
    starts = torch.randint(len(tokens) - T, (B,)).tolist()
    x, y = (
        torch.stack([torch.from_numpy(tokens[i + shift : i + shift + T].astype(np.int64)) for i in starts])
        for shift in (0, 1)
    )
    return x, y


def _speeds(sides: dict[str, Callable[[], object]], amount: float, rounds: int) -> dict[str, Spread]:
    """`amount` per second, of blocks in turn; a first one of each is not counted."""

    def block_of(side: Callable[[], object]) -> Callable[[], float]:
        def timed() -> float:
            begin = time.perf_counter()
            side()
            return time.perf_counter() - begin

        return timed

    for side in sides.values():
        side()
    seconds = interleave({name: block_of(side) for name, side in sides.items()}, rounds)
    return {name: found.map(lambda s: amount / s) for name, found in seconds.items()}
