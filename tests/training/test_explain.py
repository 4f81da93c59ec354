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
