"""Part `sizes` of gpu.sh: steps of larger models, and a whole run of a small one."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.bench.cases import GPT2, GPT2_350M, GPT2_XL, NANO, Case
from experiments.bench.gpu_measure import fitting, timed
from experiments.bench.machine import say
from experiments.bench.remote import Remote
from experiments.bench.report import Limit, Row, single
from experiments.bench.timing import spread

SIZES = {  # what is hoped for: tokens per second, or MFU in percent
    GPT2_XL: ("tokens", 55_000.0),
    GPT2_350M: ("mfu", 52.0),
}


def sizes(parts: Path, smoke: bool) -> Iterator[Row]:
    """Each in processes of its own."""
    yield from _whole_run(parts / "run", smoke)
    for case, goal in ({NANO._replace(dtype="bfloat16"): ("tokens", 1.0)} if smoke else SIZES).items():
        yield from _sized(case, dict([goal]), smoke)
    yield from _deterministic(NANO._replace(dtype="bfloat16", unroll=True) if smoke else GPT2, smoke)


def _sized(case: Case, goal: dict[str, float], smoke: bool) -> list[Row]:
    from jaxlm.telemetry.flops import flops_per_token, mfu

    def measure(case: Case) -> dict[str, Any]:
        with Remote("experiments.bench.ours:Ours", case) as side:
            first = side.call("first")
            say(f"{case.name}: compiled in {first.compile:.1f} s")
            found = timed(functools.partial(side.call, "run"), case, time.monotonic() + 12, smoke)
            tokens = found["ms"].map(lambda ms: 1e3 * case.tokens_per_step / ms)
            n, kind = side.call("matmul_parameters"), side.call("device_kind")
            each = flops_per_token(n, case.num_layers, case.context_length, case.embed_dim)
            share = mfu(tokens.median, each, kind, case.dtype, 1)
            more = {"compile": single(first.compile), "mfu": share and single(100 * share), "tokens": tokens}
            peak = side.call("peak_gb")
            return found | more | {"peak": peak and single(peak)}

    found = fitting(measure, case, ("RESOURCE_EXHAUSTED", "out of memory"))
    found["parts"] = single(found["micro_batches"])
    suite = f"{case.name}: B {case.batch_size}, T {case.context_length}, {case.dtype}"
    figures = {
        "ms": ("a step", "ms"),
        "tokens": ("tokens per second", ""),
        "mfu": ("model FLOP/s over the datasheet's peak (MFU)", "%"),
        "compile": ("compiling (lower + compile)", "s"),
        "peak": ("peak memory", "GB"),
        "mj_per_token": ("energy per token, the whole card's", "mJ"),
        "parts": ("micro-batches that fit", ""),
    }
    limits = {key: Limit("value", ">=", bound) for key, bound in goal.items()}
    return [
        Row(suite, *shown, found[key], limit=limits.get(key))
        for key, shown in figures.items()
        if found[key] is not None
    ]


def _deterministic(case: Case, smoke: bool) -> list[Row]:
    """A step with the same bits in each run, beside one without."""

    def measure(deterministic: bool) -> dict[str, Any]:
        with Remote("experiments.bench.ours:Ours", case, {"parallel.deterministic": deterministic}) as side:
            compiled = side.call("first").compile
            found = timed(functools.partial(side.call, "run"), case, time.monotonic() + 10, smoke)
            return found | {"compile": compiled}

    free, same = measure(False), measure(True)
    suite = f"{case.name}, parallel.deterministic=True"
    return [
        Row(suite, "a step", "ms", same["ms"], "without", free["ms"]),
        Row(suite, "compiling (lower + compile)", "s", single(same["compile"]), "without", single(free["compile"])),
    ]


def _whole_run(workdir: Path, smoke: bool) -> list[Row]:
    """Of configs/shakespeare_char.py on the standard library's source: 5,000 steps, evaluated every 250."""
    steps, config = 20 if smoke else 5_000, f"configs/shakespeare_char.py{':cpu' if smoke else ''}"
    fields = {"data.source": "stdlib", "data.tokenizer": "bytes", "steps": steps, "steps_per_call": steps // 20}
    fields |= {"model.dtype": "bfloat16", "eval.every": steps // 20, "checkpoint.every": 0, "log.progress": False}
    flags = [f"--config={config}", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in fields.items())]
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "jaxlm.main", *flags], check=True)
    seconds = time.perf_counter() - begin
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    times = [row["throughput/step_ms"] for row in metrics if "throughput/step_ms" in row]
    loss = [row["eval/loss"] for row in metrics if "eval/loss" in row][-1]
    suite = f"{config}, {steps:,} steps, bfloat16"
    whole = "from the command to its end, 20 evaluations included"
    return [
        Row(suite, whole, "s", single(seconds), limit=Limit("value", "<=", 30)),
        Row(suite, "a step", "ms", spread(times)),
        Row(suite, "loss on held-out text at the end", "nats", single(loss)),
    ]
