from jaxlm.training import explain, memory, step
from tests.tiny import resolved


def test_memory_is_told_with_the_attention_of_a_gpu_too():
    """On a CPU attention is in blocks, whose scores are most of what a GPU does not need."""

    def costs(**changes):
        cfg = resolved(model__context_length=256, **changes)
        return cfg, explain.costs(cfg, step.shapes(cfg), 1000)

    cfg, said = costs(model__dropout=0.0, model__dtype="bfloat16")
    here, gpu = (memory.estimate(cfg, here=here)["activations"] for here in (True, False))
    assert gpu < here / 2
    assert f"activations {here / 1e6:,.1f} MB" in said
    assert f"on a GPU          activations {gpu / 1e6:,.1f} MB, with cuDNN's attention" in said
    for changes in ({"model__dropout": 0.1}, {"model__dtype": "float32"}, {"model__attention": "blockwise"}):
        assert "on a GPU" not in costs(**{"model__dropout": 0.0, "model__dtype": "bfloat16"} | changes)[1]


def test_the_schedule_of_a_run_of_any_length_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(explain, "_DRAWN", 1000)  # of a million
    told, drawn = [explain.schedule(resolved(steps=steps), tmp_path) for steps in (1000, 2**31 - 1)], []
    assert "0.001 at the end" not in told[0]
    monkeypatch.setattr(explain.curves, "draw_schedule", lambda rates, path, steps: drawn.append((rates, steps)))
    explain.schedule(resolved(steps=2**31 - 1), tmp_path)
    [(rates, steps)] = drawn
    assert steps[0] == 0 and steps[-1] == 2**31 - 2 and len(steps) == 1000
    assert all(len(values) == 1000 for values in rates.values())
    assert told[0].splitlines()[0] == told[1].splitlines()[0]
