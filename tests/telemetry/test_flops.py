import jax.numpy as jnp
import pytest

from jaxlm import config
from jaxlm.model import gpt2
from jaxlm.telemetry.flops import flops_per_token, matmul_size, mfu, padding, peak_flops

GPT2_124M = 124_439_808 - 1024 * 768  # all parameters but the positions


def test_flops_of_gpt2_124m_by_hand():
    layer = 12 * 768**2 + 13 * 768  # qkv 3, projection 1, two MLP matrices 4 each; biases 9, layer norms 4
    assert GPT2_124M == 50257 * 768 + 12 * layer + 2 * 768 == 123_653_376
    # 6 * 123,653,376 = 741,920,256; 12 * 12 * 1024 * 768 = 113,246,208
    assert flops_per_token(GPT2_124M, num_layers=12, context_length=1024, embed_dim=768) == 855_166_464


def test_flops_against_matmuls_counted_one_by_one():
    num_layers, length, dim, vocab = 3, 16, 8, 32
    weights = [(dim, 3 * dim), (dim, dim), (dim, 4 * dim), (4 * dim, dim)] * num_layers + [(dim, vocab)]
    attention = num_layers * 2 * length * dim  # q·k and the sum over values: multiply-adds of one query
    forward = 2 * (sum(m * n for m, n in weights) + attention)
    assert flops_per_token(sum(m * n for m, n in weights), num_layers, length, dim) == 3 * forward


@pytest.mark.parametrize(
    ("kind", "dtype", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 80GB HBM3", "float32", 494.7),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H100 NVL", "bfloat16", 835.5),
        ("NVIDIA H200", "bfloat16", 989.4),
        ("NVIDIA GH200 480GB", "bfloat16", 989.4),
        ("NVIDIA B200", "float16", 2250),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312),
        ("NVIDIA A100-PCIE-40GB", "bfloat16", 312),
        ("NVIDIA A100 80GB PCIe", "float32", 156),
        ("NVIDIA A800 80GB PCIe", "bfloat16", 312),
        ("NVIDIA H800", "bfloat16", 989.4),
        ("NVIDIA H800 PCIe", "bfloat16", 756),
        ("NVIDIA A10", "bfloat16", 125),
        ("NVIDIA A10G", "bfloat16", 70),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40", "bfloat16", 181),
        ("NVIDIA L40S", "bfloat16", 362),
        ("NVIDIA H20", "bfloat16", 148),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("Tesla V100-PCIE-32GB", "float32", 14),
        ("Tesla T4", "float16", 65),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5", "bfloat16", 459),
    ],
)
def test_peak(kind, dtype, teraflops):
    assert peak_flops(kind, dtype) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("cpu", "float32"),
        ("", "float32"),
        ("NVIDIA H1000", "bfloat16"),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bfloat16"),  # a slice of one
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16"),  # another chip
        ("NVIDIA H200 PCIe", "bfloat16"),  # no such device is known
        ("NVIDIA GeForce RTX 3090 Ti", "bfloat16"),
        ("Tesla V100-SXM2-16GB", "bfloat16"),  # the hardware has none
        ("Tesla T4", "bfloat16"),
        ("TPU v4", "float16"),
        ("NVIDIA H100 80GB HBM3", "float64"),
        ("NVIDIA H100 80GB HBM3", "count"),  # an attribute of the tuple, not a dtype
    ],
)
def test_unknown_peak(kind, dtype):
    assert peak_flops(kind, dtype) is None


def test_mfu():
    assert mfu(1e6, 989.4e6, "NVIDIA H100 80GB HBM3", "bfloat16", 1) == pytest.approx(1.0)
    assert mfu(1e6, 989.4e6, "NVIDIA H100 80GB HBM3", "bfloat16", 4) == pytest.approx(0.25)
    assert mfu(1e6, 989.4e6, "cpu", "float32", 1) is None


def test_tables_that_are_only_looked_up_multiply_nothing():
    tied = {"wte": {"embedding": jnp.zeros((5, 2))}, "wpe": {"embedding": jnp.zeros((3, 2))}, "h": jnp.zeros(7)}
    assert matmul_size(tied, 5) == matmul_size(tied | {"lm_head": {"kernel": jnp.zeros((2, 5))}}, 5) == 17


SIZES = {"model.num_layers": 12, "model.num_heads": 12, "model.embed_dim": 768, "model.context_length": 1024}


@pytest.mark.parametrize("tied", [True, False])
def test_what_pads_the_vocabulary_does_not_count(tied):
    model = config.override(config.default(), {"model.vocab_size": 50257, "model.tie_embeddings": tied, **SIZES}).model
    params = gpt2.shapes(model)
    assert params["wte"]["embedding"].shape == (50304, 768) and matmul_size(params, 50257) == GPT2_124M
    assert padding(params, 50257) == (50304 - 50257) * 768 * (1 if tied else 2)
