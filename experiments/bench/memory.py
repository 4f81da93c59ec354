"""What a step of GPT-2 1.5B takes of each of 1 to 64 H200s, and what they exchange: from XLA's compiler for GPUs, which
needs none. `python -m experiments.bench.memory [--out FILE]`; in an environment with `jax[cuda13]`.

A target description (h200.txtpb) stands for the device. What is not compiled as it would be there is the choice of
matrix-product kernels, which is made by timing them.
"""

from __future__ import annotations

import argparse
import collections
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROWS = 8
"""Sequences of 1,024 tokens on a device at a time."""
BATCH = 512
WIDTHS = {"bf16": 2, "f32": 4, "s32": 4, "pred": 1, "u32": 4}
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


class Figures(NamedTuple):
    data: int
    fsdp: int
    micro_batches: int
    held: float  # GB of parameters and optimizer state
    peak: float  # GB, these included
    moved: dict[str, float]  # GB that each device gives to or takes from collectives of a kind, a step


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the table there too")
    args = parser.parse_args(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX starts: its own devices are not asked for
    os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"  # nothing to time products on
    shapes = [(1, 1), (1, 2), (1, 4), (1, 8), (2, 8), (4, 8), (8, 8), (1, 16), (1, 32), (1, 64)]
    table = shown([measure(data, fsdp) for data, fsdp in shapes])
    print(table)
    if args.out:
        args.out.write_text(table, encoding="utf-8")
    return 0


def measure(data: int, fsdp: int) -> Figures:
    """Of data x fsdp devices, eight to a host."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    from configs import gpt2
    from jaxlm import config
    from jaxlm.model import attention
    from jaxlm.training import parallel, steps

    count = data * fsdp
    name = f"1x{max(1, count // 8)}x{min(count, 8)}"
    target = Path(__file__).with_name("h200.txtpb").read_text(encoding="utf-8")
    there = topologies.get_topology_desc(name, "cuda", target_config=target, topology=name)
    attention.cudnn_serves = lambda q_BTHK, segments=False: True  # as it does there
    fields = {
        "model.remat": "block",
        "model.unroll": False,
        "data.batch_size": BATCH,
        "data.micro_batches": BATCH // (ROWS * count),
        "parallel.data": data,
        "parallel.fsdp": fsdp,
    }
    cfg = config.resolve(config.override(gpt2.get_config("1.5b"), fields))
    mesh = Mesh(np.array(there.devices).reshape(data, fsdp, 1), parallel.AXES)
    made = steps.Alone(cfg, mesh)
    compiled = made.lower("cuda").compile()
    found: Any = compiled.memory_analysis()
    held = parallel.bytes_per_device(made.like, mesh)
    return Figures(
        data, fsdp, cfg.data.micro_batches, held / 1e9, found.peak_memory_in_bytes / 1e9, moved(str(compiled.as_text()))
    )


def moved(text: str) -> dict[str, float]:
    """GB a step, by kind of collective, that each device gives or gets: the larger of what goes in and comes out."""
    times, found = calls(text), dict.fromkeys(KINDS, 0.0)
    for name, lines in computations(text).items():
        for line in lines:
            if match := re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line):
                parts = [match[1]]
                if match[3]:  # it gives (what goes in, what comes out), each in parentheses if it is several
                    pair = re.sub(r"\{[^{}]*\}", "", match[1].removeprefix("("))
                    parts = re.findall(r"\([^()]*\)|\w+\[[\d,]*\]", pair)
                found[match[2]] += times[name] * max(map(size, parts)) / 1e9
    return found


def size(shapes: str) -> int:
    """Bytes of arrays written as bf16[200,1600]."""
    given = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    return sum(WIDTHS[kind] * math.prod(map(int, filter(None, dims.split(",")))) for kind, dims in given)


def computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation of a module's text."""
    out: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = match[1]
            out[name] = []
        elif line.startswith(" ") and out:
            out[name].append(line)
    return out


def calls(text: str) -> dict[str, int]:
    """How often each computation runs in a step: loops as often as the compiler knows."""
    parts = computations(text)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    assert entry
    times: dict[str, int] = collections.defaultdict(int)

    def run(name: str, count: int) -> None:
        times[name] += count
        for line in parts.get(name, []):
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            for callee in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
                run(callee, count * (int(trips[1]) if trips and f"body=%{callee}" in line else 1))

    run(entry[1], 1)
    return times


def shown(figures: Sequence[Figures]) -> str:
    """A Markdown table."""
    lines = [
        "| GPUs | data x fsdp | micro-batches | held (GB) | peak (GB) | " + " | ".join(KINDS[:4]) + " |",
        "|---|---|---|---|---|" + "---|" * 4,
    ]
    for one in figures:
        moved = [f"{one.moved[kind]:,.1f}" for kind in KINDS[:4]]
        cells = [
            one.data * one.fsdp,
            f"{one.data} x {one.fsdp}",
            one.micro_batches,
            f"{one.held:.2f}",
            f"{one.peak:.1f}",
        ]
        lines.append("| " + " | ".join(map(str, cells + moved)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
