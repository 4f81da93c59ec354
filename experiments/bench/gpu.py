"""The parts of gpu.sh: each writes PARTS/<name>.json, `report` makes gpu.json and gpu.md of them.

    python -m experiments.bench.gpu facts|correct|ours|peer|lanes|sizes --parts DIR [--smoke]
    python -m experiments.bench.gpu report --parts DIR --out DIR

`--smoke` goes through the same code with shapes for a CPU. JAX and PyTorch are never in one process here.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench import report, trace
from experiments.bench.cases import BABY, GPT2, NANO, TINY, Case
from experiments.bench.gpu_measure import fitting, timed
from experiments.bench.gpu_report import AGREED, ALONE, EACH, assemble
from experiments.bench.gpu_sizes import sizes
from experiments.bench.lanes import Plan, measure
from experiments.bench.machine import say
from experiments.bench.report import Limit, Row, single
from experiments.bench.timing import spread

CHECKED = Case("6/6/384", 6, 6, 384, 256, 16)
STEPS = 50
CALM = {"optimizer.scale_by_learning_rate.peak": 1e-4}  # at 1e-3 rounding grows into other losses of its own accord
MEAN = 5e-3  # bf16 losses to fp32 ones, relatively: on average; EACH is the bound of the worst step
ATTENTION = 2e-2  # norm of the error over norm of the reference, of outputs and of gradients
BOX = 100.0  # seconds within which a side begins no further block
WEIGHTS = "weights.npz"


# Facts


def facts(parts: Path, smoke: bool) -> dict[str, Any]:
    """The machine, and two ceilings measured on it: a bf16 matrix product and a copy, on random data."""
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    say(f"{device.platform}: {device.device_kind}")
    if device.platform != "gpu" and not smoke:
        raise SystemExit(f"JAX found no GPU, only {device.platform}; --smoke runs on a CPU")
    size = 128 if smoke else 8192
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in (0, 1))
    product = _seconds(jax.jit(jnp.matmul), a, b)
    x = jax.random.normal(jax.random.key(2), (size * size // 8 if smoke else 2**30,))
    copy = _seconds(jax.jit(lambda x: x + 1), x)
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "matmul_tflops": 2 * size**3 / product / 1e12,
        "copy_tb_per_s": 2 * x.nbytes / copy / 1e12,
    }


def _seconds(f: Callable[..., Any], *args: Any, calls: int = 10) -> float:
    """Of a call: the median of some rows of calls, each waited for at its end."""
    f(*args).block_until_ready()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(calls):
            out = f(*args)
        out.block_until_ready()
        times.append((time.perf_counter() - begin) / calls)
    return spread(times).median


# Correctness


def correct(parts: Path, smoke: bool) -> dict[str, Any]:
    """Losses in bf16 beside those in fp32 of full precision, and attention in bf16 beside the same in fp32.

    The part fails if a bound is broken; the figures are in the report either way.
    """
    import jax

    from jaxlm.model import attention

    case = NANO._replace(unroll=True) if smoke else CHECKED
    half = case._replace(dtype="bfloat16")
    with jax.default_matmul_precision("highest"):
        reference = _losses(case._replace(attention="blockwise"))
    say(f"fp32: {reference[0]:.4f} to {reference[-1]:.4f}")
    rows: list[Row] = []
    broken: list[str] = []
    learns = reference[-1] / reference[0]
    rows.append(_check(f"fp32: loss of step {STEPS} over that of step 1", learns, 0.97))
    kinds = ["blockwise"] + (["cudnn"] if jax.default_backend() == "gpu" else [])
    for kind in kinds:
        try:
            losses = _losses(half._replace(attention=kind))
            errors = _attention_errors(kind, smoke)
        except Exception as error:  # what the other kind is worth is still to be seen
            broken.append(f"{kind} raised {type(error).__name__}: {str(error)[:300]}")
            continue
        difference = np.abs(np.array(losses) / np.array(reference) - 1)
        say(f"bf16, {kind}: at most {difference.max():.1e} from fp32")
        rows.append(_check(f"bf16 to fp32, {kind}: loss, worst of {STEPS} steps", difference.max(), EACH))
        rows.append(_check(f"bf16 to fp32, {kind}: loss, mean of {STEPS} steps", difference.mean(), MEAN))
        for name, distance in errors.items():
            rows.append(_check(f"attention in bf16, {kind}: error of {name}", distance, ATTENTION))
    q_BTHK = jax.ShapeDtypeStruct(
        (2, case.context_length, case.num_heads, case.embed_dim // case.num_heads), "bfloat16"
    )
    chosen = "cudnn" if attention.cudnn_serves(q_BTHK) else "blockwise"
    say(f"attention='auto' takes {chosen}")
    broken += [row.figure for row in rows if not row.met]
    say("BROKEN: " + "; ".join(broken) if broken else "all checks hold")
    return {"rows": rows, "notes": [f"Check failed: {figure}." for figure in broken], "failed": bool(broken)}


def _check(figure: str, value: float, bound: float) -> Row:
    return Row("correctness", figure, "", single(float(value)), limit=Limit("value", "<=", bound))


def _losses(case: Case) -> list[float]:
    from experiments.bench.ours import Ours

    return Ours(case, CALM).run(0, STEPS)[0]


def _attention_errors(kind: str, smoke: bool) -> dict[str, float]:
    """|x - reference| / |reference| of attention's output and gradients in bf16, on random inputs."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh

    from jaxlm.model.attention import causal
    from jaxlm.training import parallel

    shape = (2, 32, 2, 16) if smoke else (8, 256, 12, 64)  # two blocks: more of them compile for minutes
    inputs = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(4)]

    def both(*inputs: jax.Array, dtype: Any, implementation: str) -> tuple[jax.Array, ...]:
        q, k, v, upstream = (x.astype(dtype) for x in inputs)
        out, pull = jax.vjp(lambda q, k, v: causal(q, k, v, implementation=implementation), q, k, v)
        return (out, *pull(upstream))

    def run(dtype: Any, implementation: str) -> list[np.ndarray]:
        pure = functools.partial(both, dtype=dtype, implementation=implementation)
        found = parallel.compile(pure, Mesh(np.array(jax.devices()[:1]), ("data",)))(*inputs)
        return [np.asarray(x.astype(jnp.float32), np.float64) for x in found]

    with jax.default_matmul_precision("highest"):
        reference = run(jnp.float32, "blockwise")
    found = run(jnp.bfloat16, kind)
    names = ("the output", "q's gradient", "k's gradient", "v's gradient")
    return {
        name: float(np.linalg.norm(x - r) / np.linalg.norm(r))
        for name, x, r in zip(names, found, reference, strict=True)
    }


# Speed


def ours(parts: Path, smoke: bool) -> dict[str, Any]:
    """jaxlm's steps; leaves its initial weights in `parts` for the peer."""
    import jax

    from experiments.bench.ours import Ours
    from jaxlm.telemetry.flops import flops_per_token, mfu

    deadline = time.monotonic() + BOX

    def measure(case: Case) -> dict[str, Any]:
        side = Ours(case)
        weights: Any = side.weights()
        np.savez(parts / WEIGHTS, **weights)
        del weights
        first = side.first()
        say(f"compiled in {first.compile:.1f} s")
        losses = first.losses + side.run(1, AGREED - 1)[0]
        found = timed(side.run, case, deadline, smoke)
        per_token = flops_per_token(side.matmul_parameters(), case.num_layers, case.context_length, case.embed_dim)
        device = jax.devices()[0]
        rate = 1e3 * case.tokens_per_step / found["ms"].median
        found |= _profiled(side.run, parts)
        return found | {
            "losses": losses,
            "compile": first.compile,
            "first": first.seconds,
            "peak_gb": side.peak_gb(),
            "mfu": mfu(rate, per_token, device.device_kind, case.dtype, 1),
            "tflops": rate * per_token / 1e12,
        }

    return fitting(measure, _shape(smoke), ("RESOURCE_EXHAUSTED", "out of memory"))


def peer(parts: Path, smoke: bool) -> dict[str, Any]:
    """PyTorch's steps: eager first, then compiled, which may fail or run out of time."""
    import torch

    from experiments.bench.peer import Peer

    deadline = time.monotonic() + BOX
    weights = dict(np.load(parts / WEIGHTS)) if (parts / WEIGHTS).exists() else None
    if weights is None:
        say("no weights from jaxlm: starting from others, losses not compared")

    def measure(case: Case, compile: bool) -> dict[str, Any]:
        side = Peer(case, weights, compile)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        one, first = side.first()
        losses = one + side.run(1, AGREED - 1)[0]
        found = timed(side.run, case, deadline, smoke)
        peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
        return found | {"losses": losses, "first": first, "peak_gb": peak, "same_weights": weights is not None}

    modes: dict[str, Any] = {}
    for mode, compile in (("eager", False), ("torch.compile", True)):
        say(mode)
        try:
            modes[mode] = fitting(functools.partial(measure, compile=compile), _shape(smoke), ("out of memory",))
        except Exception as error:
            modes[mode] = {"error": f"{type(error).__name__}: {error}"[:500]}
            say(f"{mode} failed: {modes[mode]['error']}")
        _write(parts / "peer.json", {"modes": modes})  # what there is, should time run out
    return {"modes": modes, "failed": all("error" in found for found in modes.values())}


def _shape(smoke: bool) -> Case:
    return NANO._replace(dtype="bfloat16", unroll=True, vocab_size=384) if smoke else GPT2


def _profiled(run: Callable[[int, int], Any], parts: Path) -> dict[str, Any]:
    """The kernels that took longest, and all of a step's together; {} where the profiler does not serve."""
    steps = 3
    try:
        found = trace.kernels(trace.record(lambda: run(AGREED, steps), parts / "trace"), steps)
    except Exception as error:  # no figure needs it
        say(f"no profile: {type(error).__name__}: {str(error)[:200]}")
        return {}
    return {"busy_ms": sum(kernel.ms for kernel in found), "kernels": found[:60]}


def _write(path: Path, found: dict[str, Any]) -> None:
    def plain(value: Any) -> Any:
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            return plain(value._asdict())
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    path.write_text(json.dumps(plain(found)))


def lanes(parts: Path, smoke: bool) -> dict[str, Any]:
    """Trials as lanes of one program, beside the same trials one after another."""
    small = Plan(TINY, (1, 4, 16, 64), steps=32, rounds=5, limits={64: 30.0})
    large = Plan(BABY, (1, 4, 16), steps=8, rounds=3, limits={16: 2.5})
    plans = (Plan(NANO, (1, 2), steps=2, rounds=1),) if smoke else (small, large)
    return _kept(parts / "lanes.json", itertools.chain.from_iterable(map(measure, plans)))


def larger(parts: Path, smoke: bool) -> dict[str, Any]:
    """Steps of larger models, and a whole run of a small one."""
    return _kept(parts / "sizes.json", sizes(parts, smoke))


def _kept(path: Path, rows: Iterable[Row]) -> dict[str, Any]:
    """Writes what there is after each row, should time run out."""
    found: dict[str, Any] = {"rows": []}
    for row in rows:
        found["rows"].append(row)
        _write(path, found)
    return found


PARTS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "facts": facts,
    "correct": correct,
    "ours": ours,
    "peer": peer,
    "lanes": lanes,
    "sizes": larger,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.gpu")
    parser.add_argument("part", choices=[*PARTS, "report"])
    parser.add_argument("--parts", type=Path, required=True, help="folder that the parts share")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="of gpu.json and gpu.md")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on any device")
    args = parser.parse_args(argv)
    if args.part == "report":
        smoke = (args.parts / "smoke").exists()
        doc = assemble(args.parts, _shape(smoke))
        only = next((f"_{name}" for name in ALONE if doc["parts"][name]), "")
        report.store(doc, args.out, f"gpu{only}{'-smoke' if smoke else ''}")
        print(report.markdown(doc))
        return 1 if doc["failed"] else 0
    if args.smoke:
        (args.parts / "smoke").touch()
    found = PARTS[args.part](args.parts, args.smoke)
    _write(args.parts / f"{args.part}.json", found)
    return 1 if found.get("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
