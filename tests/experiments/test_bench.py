"""The benchmarks run, refuse to compare what differs, and report what they found. Nothing here is timed."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.bench import __main__ as bench
from experiments.bench import (
    cases,
    checkpoint,
    decode,
    gpu_sizes,
    lanes,
    load,
    machine,
    optimizer,
    report,
    step,
    switches,
    trace,
)
from experiments.bench import energy as bench_energy
from experiments.bench.remote import Remote
from experiments.bench.report import Limit, Row, single
from experiments.bench.timing import interleave, spread
from jaxlm.telemetry import energy

ROOT = Path(__file__).parents[2]
needs_torch = pytest.mark.skipif(
    not machine.has("torch", "transformers"), reason="needs PyTorch: `make torch` with Python 3.11"
)


# The agreement of losses


def test_agree_gives_the_largest_difference():
    assert step.agree([2.0, 1.00005], [2.0, 1.0]) == pytest.approx(5e-5, rel=1e-6)


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ([2.0, 1.002], [2.0, 1.0], "step 1: jaxlm's loss is 1.002000, PyTorch's 1.000000"),
        ([2.0, float("nan")], [2.0, 1.0], "step 1"),
        ([2.0, 1.0], [2.0, float("nan")], "step 1"),
        ([2.0, 1.0], [2.0], "jaxlm has 2 losses, PyTorch 1"),
        ([], [], "expected as many"),
    ],
)
def test_agree_refuses(ours, theirs, message):
    with pytest.raises(step.Disagreement, match=message):
        step.agree(ours, theirs)


@pytest.fixture(scope="module")
def nano():
    """jaxlm's initial weights and losses of the smallest case."""
    from experiments.bench.ours import Ours

    side = Ours(cases.NANO)
    weights = side.weights()
    return weights, side.run(0, step.STEPS)[0]


@needs_torch
def test_both_sides_train_alike(nano):
    from experiments.bench.peer import Peer

    weights, losses = nano
    peer = Peer(cases.NANO._replace(micro_batches=2), weights)
    step.agree(losses, peer.run(0, step.STEPS)[0], bound=1e-5)
    assert losses[-1] < 0.97 * losses[0], "nothing was learned: agreement says nothing"


@needs_torch
@pytest.mark.parametrize(
    "planted", ["other weights", "one weight", "no decay", "no clipping", "another schedule", "batches"]
)
def test_a_planted_difference_is_found(nano, planted, monkeypatch):
    from experiments.bench.peer import Peer

    weights, losses = nano
    start = 0
    bound = step.BOUND
    match planted:
        case "other weights":
            weights = None
        case "one weight":
            name = "transformer.h.0.mlp.c_fc.weight"
            weights = weights | {name: weights[name] * np.float32(1.5)}
        case "no decay":  # in this small model it is just at the bound; alike, the sides are 1000 times nearer
            monkeypatch.setattr(cases, "WEIGHT_DECAY", 0.0)
            bound = 1e-5
        case "no clipping":
            monkeypatch.setattr(cases, "CLIP", 1e9)
        case "another schedule":
            monkeypatch.setattr(cases, "WARMUP", 100)
        case "batches":
            start = 1
    found = Peer(cases.NANO, weights).run(start, step.STEPS)[0]
    with pytest.raises(step.Disagreement):
        step.agree(losses, found, bound)


def test_several_steps_a_call_are_the_same_steps(nano):
    from experiments.bench.ours import Ours

    side = Ours(cases.NANO, {"steps_per_call": 10})
    first = side.first()
    assert first.seconds >= first.compile > 0
    step.agree(first.losses + side.run(10, 10)[0], nano[1], bound=1e-5)


def test_the_peers_schedule_is_ours():
    from jaxlm.optim import scheduled

    stage = dict(cases.settings(cases.NANO).optimizer.scale_by_learning_rate)
    ours = scheduled.number(steps=cases.STEPS, **stage)
    for n in (0, 1, cases.WARMUP - 1, cases.WARMUP, 500, cases.STEPS, cases.STEPS + 5):
        assert float(ours(n)) == pytest.approx(cases.learning_rate(n), rel=1e-5)


# Timing and reports


def test_interleave_turns_the_order_around():
    seen = []
    found = interleave({name: lambda name=name: seen.append(name) or len(seen) for name in "ab"}, 3)
    assert "".join(seen) == "abbaab"
    assert found["a"].samples == (1, 4, 5)
    assert found["b"].median == 3


def test_spread_gives_median_and_quartiles():
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0])[:3] == (3.0, 2.0, 4.0)
    assert spread([7.0])[:3] == (7.0, 7.0, 7.0)
    assert spread([1.0, 2.0, 4.0]).map(lambda x: 8 / x).samples == (8.0, 4.0, 2.0)


FACTS = {
    **{"date": "2026-01-02", "cpu": "A CPU", "cores": 2, "memory_gib": 8.0, "system": "Linux x86_64", "load": 0.1},
    **{"gpu": "", "python": "3.11.7", "versions": {"jax": "1.2.3"}, "settings": {"NPROC": "2"}},
}


def test_a_report_reads_well():
    ours, theirs = spread([10.0, 12.0, 11.0]), spread([10.0, 10.0, 10.0])
    rows = [
        Row("step", "a step", "ms", ours, "PyTorch", theirs, Limit("ratio", "<=", 1.5)),
        Row("step", "tokens per second", "", single(14000.0), limit=Limit("value", ">=", 15000)),
        Row("step", "alone", "s", single(1.23456), limit=Limit("ratio", "<=", 1.5)),
        Row("data", "encoding", "MB/s", single(0.5)),
    ]
    assert rows[0].ratio is not None and rows[0].ratio.median == 1.1
    doc = json.loads(json.dumps(report.document(rows, FACTS)))
    assert report.markdown(doc) == (
        "2026-01-02: A CPU, 2 cores, 8 GiB, Linux x86_64, load 0.1 at the start; Python 3.11.7, jax 1.2.3; NPROC=2.\n"
        "\n"
        "| step | jaxlm | beside | jaxlm / beside | limit |\n"
        "|---|---|---|---|---|\n"
        "| a step (ms) | 11 (10.5 to 11.5) | 10 (10 to 10) PyTorch | 1.1 (1.05 to 1.15) | ratio <= 1.5: kept |\n"
        "| tokens per second | 14,000 |  |  | >= 15,000: **missed** |\n"
        "| alone (s) | 1.23 |  |  | ratio <= 1.5 |\n"
        "\n"
        "| data | jaxlm | beside | jaxlm / beside | limit |\n"
        "|---|---|---|---|---|\n"
        "| encoding (MB/s) | 0.5 |  |  |  |\n"
    )


def test_results_fill_the_readme(tmp_path):
    text = "a\n<!-- results: cpu -->\nold\n<!-- end -->\nb\n<!-- results: gpu -->\nold\n<!-- end -->\n"
    doc = report.document([Row("step", "a step", "ms", single(2.0))], FACTS)
    report.store(doc, tmp_path, "cpu")
    assert (tmp_path / "cpu.md").read_text() == report.markdown(json.loads((tmp_path / "cpu.json").read_text()))
    filled = report.fill(text, tmp_path)
    assert "| a step (ms) | 2 |" in filled and "old" not in filled
    assert filled.endswith("b\n<!-- results: gpu -->\nnot yet measured\n<!-- end -->\n")
    assert report.fill(filled, tmp_path) == filled


def test_the_readme_has_places_for_results():
    readme = (report.HERE / "README.md").read_text()
    assert "<!-- results: cpu -->" in readme and "<!-- results: gpu -->" in readme
    for name in ("cpu", "gpu"):
        if not (report.RESULTS / f"{name}.json").exists():
            assert f"<!-- results: {name} -->\nnot yet measured\n<!-- end -->" in readme


def test_facts_do_not_name_the_machine():
    facts = json.dumps(machine.facts())
    import platform

    assert platform.node() not in facts or len(platform.node()) < 4
    assert str(ROOT) not in facts


# The doors


def test_an_unknown_suite_is_refused(capsys):
    with pytest.raises(SystemExit) as error:
        bench.main(["--suite", "everything"])
    assert error.value.code == 2
    assert "choose from" in capsys.readouterr().err


def test_a_suite_that_breaks_leaves_the_others_figures(monkeypatch, capsys, tmp_path):
    def run(quick):
        raise step.Disagreement("step 3: apart")

    monkeypatch.setattr(step, "run", run)
    monkeypatch.setattr(load, "run", lambda quick: [Row("load", "loading", "s", single(2.0))])
    assert bench.main(["--suite", "step", "load", "--out", str(tmp_path)]) == 1
    doc = json.loads((tmp_path / "cpu-step-load.json").read_text())
    assert doc["notes"] == ["Suite step failed: Disagreement: step 3: apart."]
    assert [row["figure"] for row in doc["rows"]] == ["loading"]
    assert "**Suite step failed" in capsys.readouterr().out


@pytest.mark.slow
@needs_torch
def test_the_step_suite(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(step, "run", lambda quick: step.measure(cases.NANO, rounds=2, block=2, many=2, floor=1e12))
    assert bench.main(["--quick", "--suite", "step", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"cpu-step-quick.json", "cpu-step-quick.md"}
    rows = {row["figure"]: row for row in json.loads((tmp_path / "cpu-step-quick.json").read_text())["rows"]}
    assert rows["nano: losses of 20 steps, largest relative difference"]["met"] is True
    assert len(rows["nano: a step"]["ratio"]["samples"]) == 2
    assert rows["nano: tokens per second, 2 steps a call"]["met"] is False
    assert "| nano: a step (ms) |" in capsys.readouterr().out


class Side(contextlib.nullcontext):
    """As `Remote`, with losses that are PyTorch's own."""

    def __init__(self, factory, *_):
        super().__init__(self)
        self._ours, self._loss = "ours" in factory, 2.1 if "peer" in factory else 2.0

    def call(self, method, *args):
        losses = [self._loss] * (args[1] if args else 1)
        return SimpleNamespace(losses=losses) if self._ours and method == "first" else (losses, 1.0)


def test_the_step_suite_refuses_to_time_what_differs(monkeypatch):
    monkeypatch.setattr(step, "Remote", Side)
    monkeypatch.setattr(step.machine, "has", lambda *_: True)
    monkeypatch.setattr(step, "interleave", lambda *_: pytest.fail("timed"))
    with pytest.raises(step.Disagreement, match="PyTorch's"):
        step.measure(cases.NANO, rounds=1, block=1)


@pytest.mark.slow
def test_the_host_suite(tmp_path):
    assert bench.main(["--quick", "--suite", "host", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "cpu-host-quick.json").read_text())["rows"]
    assert len(rows) == 2 and all("the loop's own time a step" in row["figure"] for row in rows)


@pytest.mark.slow
def test_the_switches_suite():
    figures = [(row.figure, row.peer) for row in switches.run(quick=True)]
    assert figures == [
        ("nano, model.remat=block: a step", "without"),
        ("nano, model.remat=block: memory of a step", "without"),
        ("nano, steps_per_call=2: a step", "without"),
        ("nano, memory handed back to the system: a step", "without"),
    ]
    names = [f"{one.case.name} {one.name}" for one in switches.SWITCHES]
    assert len(set(names)) == len(names)


def test_a_switch_that_changes_the_losses_is_not_timed(monkeypatch):
    def remote(factory, case, *fields):
        side = Side("plain")
        side._loss += bool(fields)
        return side

    monkeypatch.setattr(switches, "Remote", remote)
    monkeypatch.setattr(switches, "interleave", lambda *_: pytest.fail("timed"))
    with pytest.raises(step.Disagreement, match="without it"):
        list(switches.measure(switches.Switch(cases.NANO, {"loss.l2": 0.5}), rounds=1))


@pytest.mark.slow
def test_the_energy_suite(monkeypatch):
    @contextlib.contextmanager
    def metered(kind, say):
        assert kind == "estimate"  # a counter, if there is one
        yield energy.Meter("a clock of 2 W", lambda: 2 * time.perf_counter(), idle=1.0)

    monkeypatch.setattr(energy, "meter", metered)
    used, idle = bench_energy.run(quick=True)
    assert used.figure == "nano: energy per token, a clock of 2 W" and used.value.median > 0
    assert idle.value.median == 1.0


def test_without_a_meter_there_is_no_figure(monkeypatch):
    monkeypatch.setattr(energy, "meter", lambda kind, say: contextlib.nullcontext())
    assert bench_energy.run(quick=True) == []


@pytest.mark.slow
def test_larger_models_and_a_whole_run_are_measured(monkeypatch, tmp_path):
    wait, ran = subprocess.run, []

    def short(command, **options):
        ran.extend(command)
        less = ("steps=4", "eval.every=2", "log.every=1")
        return wait([*command, *(f"--config.{field}" for field in less)], **options)

    monkeypatch.setattr(gpu_sizes.subprocess, "run", short)
    rows = {row.figure: row for row in gpu_sizes.sizes(tmp_path, smoke=True)}
    assert "--config.model.dtype=bfloat16" in ran
    assert rows["from the command to its end, 20 evaluations included"].value.median > 0
    assert rows["tokens per second"].value.median > 0 and rows["micro-batches that fit"].value.median == 1


def test_what_a_process_raises_is_raised_here():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        Remote("fractions:Fraction", 1, 0)
    with Remote("fractions:Fraction", 1, 2) as far:
        assert far.call("__add__", 1) == 1.5
        with pytest.raises(RuntimeError, match="no attribute 'halve'"):
            far.call("halve")


@pytest.mark.slow
def test_the_data_suite(tmp_path):
    assert bench.main(["--quick", "--suite", "data", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "cpu-data-quick.json").read_text())["rows"]
    assert {"encoding, bytes", "encoding, chars", "encoding, bpe:2048"} <= {row["figure"] for row in rows}


@pytest.mark.slow
def test_the_optimizer_suite():
    rows = optimizer.measure(cases.NANO, rounds=2)  # which compares the sides' parameters first
    assert [row.peer for row in rows] == (
        ["PyTorch's AdamW, fused", "PyTorch's AdamW, foreach"] if machine.has("torch") else [""]
    )


@pytest.mark.slow
def test_the_lanes_suite(monkeypatch):
    plan = lanes.Plan(cases.NANO, (1, 2), steps=2, rounds=1, limits={2: 30.0})
    one, two = lanes.measure(plan)  # which compares the losses first
    assert two.value.median > 0 and two.limit == Limit("ratio", ">=", 30.0) and one.limit is None
    monkeypatch.setattr(lanes, "interleave", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(lanes, "agree", lambda ours, theirs: step.agree(ours, [x * 1.01 for x in theirs]))
    with pytest.raises(step.Disagreement):
        list(lanes.measure(plan))


@needs_torch
def test_the_optimizer_suite_refuses_to_time_what_differs():
    ours = {"wte/embedding": np.zeros(4, np.float32)}
    optimizer.agree(ours, {"wte/embedding": np.full(4, 1e-7, np.float32)}, "fused")
    with pytest.raises(step.Disagreement, match=r"differ by 0.0006 after 3 updates"):
        optimizer.agree(ours, {"wte/embedding": np.full(4, 6e-4, np.float32)}, "fused")


DECODING = cases.NANO._replace(context_length=128)


@pytest.mark.slow
def test_the_decode_suite():
    rows = {row.figure: row for row in decode.measure(DECODING, rounds=2, batches=(2,), new=8)}
    speed = rows["nano, batch 2: tokens per second"]
    assert len(speed.value.samples) == 2 and speed.limit == Limit("ratio", ">=", 1.0)
    assert bool(speed.peer) == machine.has("torch", "transformers")


@pytest.mark.slow
@needs_torch
def test_the_decode_suite_refuses_to_time_what_differs(monkeypatch):
    def remote(factory, case, *weights):
        return Remote(factory, case, *({} for _ in weights))  # the peer keeps weights of its own

    monkeypatch.setattr(decode, "Remote", remote)
    monkeypatch.setattr(decode, "interleave", lambda *_: pytest.fail("timed"))
    with pytest.raises(step.Disagreement, match="the first . agree"):
        decode.measure(DECODING, rounds=1, batches=(2,), new=8)


@pytest.mark.slow
def test_the_save_suite():
    rows = checkpoint.measure(cases.NANO._replace(vocab_size=257), rounds=1)
    held, whole, restored = (row.value.median for row in rows)
    assert 0 < held <= whole and restored > 0 and rows[0].limit == checkpoint.LIMIT


@pytest.mark.slow
@pytest.mark.skipif(not load.STATUS.exists(), reason="needs Linux's count of memory")
def test_the_load_suite():
    rows = {row.figure: row for row in load.measure(cases.NANO._replace(vocab_size=257), rounds=1)}
    for what in ("a run directory", "a Hugging Face folder"):
        assert rows[f"nano, fp32: loading {what}"].value.median > 0
        memory = rows[f"nano, fp32: {what}: peak memory, over the parameters' bytes"]
        assert memory.value.median > 1 and memory.met is False  # so small a model is the least of what is loaded
        assert bool(memory.peer) == machine.has("torch", "transformers")


@pytest.mark.slow
def test_startup_sees_the_first_step(tmp_path):
    from experiments.bench import startup

    assert startup.first_step(tmp_path / "run", tmp_path / "cache") > 0
    with pytest.raises(RuntimeError, match="ended with 2"):
        startup._until(["jaxlm.main", "--config=configs/nothing.py"], tmp_path / "never")


@pytest.mark.slow
def test_gpu_parts_on_a_cpu(tmp_path):
    command = ["bash", str(report.HERE / "gpu.sh"), "--smoke"]
    environment = {"OUT": str(tmp_path), "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    peer = machine.has("torch", "transformers")
    assert done.returncode == (0 if peer else 1), done.stdout + done.stderr
    doc = json.loads((tmp_path / "gpu-smoke.json").read_text())
    assert doc["notes"] == ([] if peer else ["Part peer failed."])
    rows = {row["figure"]: row for row in doc["rows"]}
    assert all(row["met"] is not False for row in rows.values())
    assert rows["a step"]["value"]["median"] > 0
    if peer:
        assert set(doc["parts"]["peer"]["modes"]) == {"eager", "torch.compile"}
        assert rows["losses of 20 steps, largest relative difference"]["met"] is True


@pytest.mark.slow
def test_gpu_checks_can_fail(monkeypatch, tmp_path):
    from experiments.bench import gpu

    monkeypatch.setattr(gpu, "EACH", 1e-12)
    assert gpu.main(["correct", "--parts", str(tmp_path), "--smoke"]) == 1
    (tmp_path / "correct.failed").touch()
    doc = gpu.assemble(tmp_path, cases.NANO)
    assert doc["failed"]
    assert "Check failed: bf16 to fp32, blockwise: loss, worst of 50 steps." in doc["notes"]
    assert "Part ours failed." in doc["notes"]


def test_a_profile_names_what_ran_and_how_long(tmp_path):
    import jax
    import jax.numpy as jnp

    x, function = jnp.ones((256, 256)), jax.jit(lambda x: jnp.sin(x @ x))
    function(x)
    file = trace.record(lambda: [function(x).block_until_ready() for _ in range(3)], tmp_path)
    found = trace.kernels(file, 3, device="/host:CPU", line="")
    assert [kernel.ms for kernel in found] == sorted((kernel.ms for kernel in found), reverse=True)
    assert any("fusion" in kernel.name and kernel.calls >= 1 and 0 < kernel.ms < 1e3 for kernel in found)
    assert trace.kernels(file, 3) == []  # no GPU


def test_gpu_falls_back_to_micro_batches():
    from experiments.bench import gpu_measure

    tried = []

    def measure(case):
        tried.append(case.micro_batches)
        if case.micro_batches < 4:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return {}

    assert gpu_measure.fitting(measure, cases.GPT2, ("RESOURCE_EXHAUSTED",)) == {"micro_batches": 4}
    assert tried == [1, 2, 4]
    with pytest.raises(RuntimeError, match="something else"):
        gpu_measure.fitting(lambda case: (_ for _ in ()).throw(RuntimeError("something else")), cases.GPT2, ("memory",))


HLO = """HloModule step

%body (p: f32[8]) -> f32[8] {
  %gathered = (bf16[8,200]{1,0}, bf16[64,200]{1,0}) all-gather-start(%p), dimensions={0}
  %many = ((bf16[200]{0}, f32[2]{0:T(8)}), (bf16[1600]{0}, f32[16]{0})) all-gather-start(%p, %q), dimensions={0}
  %added = f32[500]{0} all-reduce(%p), to_apply=%add
}

%inner (p: f32[8]) -> f32[8] {
  %scattered = (f32[800]{0}, f32[100]{0}) reduce-scatter-start(%p), dimensions={0}
  %again = f32[8]{0} while(%p), condition=%less, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %loop = f32[8]{0} while(%p), condition=%less, body=%inner, backend_config={"known_trip_count":{"n":"10"}}
  %once = (f32[200]{0}, f32[50]{0}) all-reduce(%p, %q), to_apply=%add
}
"""


def test_what_devices_exchange_is_counted_in_bytes_and_as_often_as_loops_run():
    from experiments.bench import memory

    moved = memory.moved(HLO)
    assert moved["all-gather"] * 1e9 == 30 * (64 * 200 * 2 + 1600 * 2 + 16 * 4)
    assert moved["reduce-scatter"] * 1e9 == 10 * 800 * 4
    assert moved["all-reduce"] * 1e9 == pytest.approx(30 * 500 * 4 + 250 * 4)
    assert moved["all-to-all"] == 0
    figures = memory.Figures(2, 8, 4, 2.346, 7.04, moved)
    assert memory.shown([figures]).splitlines()[-1].startswith("| 16 | 2 x 8 | 4 | 2.35 | 7.0 | 0.0 |")
