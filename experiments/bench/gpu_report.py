"""What the parts of gpu.sh left behind, as one document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.bench import machine, report
from experiments.bench.cases import GPT2, Case
from experiments.bench.report import Limit, Row, single
from experiments.bench.step import Disagreement, agree
from experiments.bench.timing import Spread

NAMES = ("facts", "correct", "ours", "peer")
ALONE = ("lanes", "sizes")  # parts that are calls of their own
EACH = 2e-2  # relatively: losses in bf16 to those in fp32, and of jaxlm to those of the peer
AGREED = 20  # steps whose losses jaxlm and the peer compare
GOALS = {  # of GPT-2 124M on an H200
    "rate": Limit("value", ">=", 540_000),
    "compile": Limit("value", "<=", 60),
    "peak_gb": Limit("value", "<=", 32),
    "mj_per_token": Limit("value", "<=", 1.2),
}


def assemble(parts: Path, case: Case) -> dict[str, Any]:
    """The document of what the parts left; what failed is said in its notes."""
    found = {name: _read(parts / f"{name}.json") for name in (*NAMES, *ALONE)}
    alone = [(name,) for name in ALONE if found[name] or (parts / f"{name}.failed").exists()]
    asked = alone[0] if alone else NAMES
    notes = [f"Part {name} failed." for name in asked if (parts / f"{name}.failed").exists() or not found[name]]
    rows = [_row(row) for name in (*ALONE, "correct") for row in found[name].get("rows", [])]
    notes += found["correct"].get("notes", [])
    if found["facts"]:
        rows.insert(0, _plain_row("device", "bf16 matrix product", "TFLOP/s", found["facts"]["matmul_tflops"]))
        rows.insert(1, _plain_row("device", "copy, read and written", "TB/s", found["facts"]["copy_tb_per_s"]))
    modes = {mode: each for mode, each in found["peer"].get("modes", {}).items() if "error" not in each}
    notes += [f"{m}: {e['error']}" for m, e in found["peer"].get("modes", {}).items() if "error" in e]
    failed = bool(notes)
    if found["ours"]:
        if found["facts"]:
            found["ours"]["of_product"] = 100 * found["ours"]["tflops"] / found["facts"]["matmul_tflops"]
        try:
            rows += _speed_rows(found["ours"], modes, case)
        except Disagreement as error:
            failed = True
            notes.append(f"jaxlm and the peer are not compared: {error}.")
            rows += _speed_rows(found["ours"], {}, case)
    elif modes:
        best = min(modes, key=lambda m: modes[m]["ms"]["median"])
        notes.append(f"Only the peer was measured: {best}, {modes[best]['ms']['median']:.1f} ms a step.")
    return report.document(rows, machine.facts(), notes=notes, parts=found, failed=failed)


def _speed_rows(mine: dict[str, Any], modes: dict[str, Any], case: Case) -> list[Row]:
    """jaxlm's figures beside those of the peer's faster mode.

    Raises:
      Disagreement: from the same weights they come to other losses.
    """
    suite = f"{case.name}: B {case.batch_size}, T {case.context_length}, {case.dtype}"
    rows, theirs, name = [], None, ""
    if modes:
        best = min(modes, key=lambda m: modes[m]["ms"]["median"])
        theirs, name = modes[best], f"PyTorch, {best}"
        if theirs["same_weights"]:
            worst = agree(mine["losses"], theirs["losses"], EACH)
            figure = f"losses of {AGREED} steps, largest relative difference"
            rows.append(Row(suite, figure, "", single(worst), limit=Limit("value", "<=", EACH)))

    def row(figure: str, unit: str, key: str) -> None:
        value, other = mine.get(key), theirs.get(key) if theirs else None
        if value is None:
            return
        limit = GOALS.get(key) if case == GPT2 else None
        rows.append(Row(suite, figure, unit, _spread(value), name if other is not None else "", _spread(other), limit))

    for side in (mine, theirs):
        if side:
            side["rate"] = _spread(side["ms"]).map(lambda ms: 1e3 * case.tokens_per_step / ms)._asdict()
    mine["mfu_percent"] = mine["mfu"] and 100 * mine["mfu"]
    row("a step", "ms", "ms")
    row("tokens per second", "", "rate")
    row("model FLOP/s over the datasheet's peak (MFU)", "%", "mfu_percent")
    row("model FLOP/s over those of the matrix product above", "%", "of_product")
    row("model FLOP/s", "TFLOP/s", "tflops")
    row("compiling (lower + compile)", "s", "compile")
    row("first step, from call to loss", "s", "first")
    row("peak memory", "GB", "peak_gb")
    row("energy per token, the whole card's", "mJ", "mj_per_token")
    row("micro-batches that fit", "", "micro_batches")
    return rows


def _spread(value: Any) -> Any:
    """A Spread of what JSON made of one, of a number, or None."""
    if value is None:
        return None
    return Spread(**value)._replace(samples=tuple(value["samples"])) if isinstance(value, dict) else single(value)


def _plain_row(suite: str, figure: str, unit: str, value: float) -> Row:
    return Row(suite, figure, unit, single(value))


def _row(raw: dict[str, Any]) -> Row:
    fields = {name: raw[name] for name in ("suite", "figure", "unit")}
    peer = {"peer": raw["peer"], "peer_value": _spread(raw["peer_value"])}
    return Row(**fields, **peer, value=_spread(raw["value"]), limit=raw["limit"] and Limit(**raw["limit"]))


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found
