"""Model FLOPs per token, peaks of accelerators, and the model FLOPs utilization (MFU) that follows."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from jaxlm import tree


def flops_per_token(num_params: int, num_layers: int, context_length: int, embed_dim: int) -> int:
    """FLOPs of one training token, forward and backward: 6 N + 12 L T D.

    A multiply-add is two FLOPs. Each weight of a matmul does one per token forward and two backward: 6 N. Attention
    adds q·k and the sum over values, 2 T D multiply-adds per layer forward, thrice that with backward: 12 L T D. As in
    the sources, the causal mask is not credited (each token counts T keys), nor is recomputation by remat (MFU, not
    HFU).

    Sources: PaLM (arXiv:2204.02311), appendix B; nanoGPT `estimate_mfu`.

    Args:
      num_params: N, all parameters, each once. A tied embedding counts, as it is the matmul of the head; the table of
        positions does not, as it is only looked up (so 123,653,376 for GPT-2's 124M). Biases and layer norms, one part
        in a thousand, may be in.
      num_layers: L.
      context_length: T, the length of the training sequences.
      embed_dim: D, heads times head dimension.
    """
    return 6 * num_params + 12 * num_layers * context_length * embed_dim


def of_model(model: Any, params: Any) -> int:
    """`flops_per_token` of a config's `model` section and its parameters, or their shapes."""
    N = matmul_size(params, model.vocab_size)
    return flops_per_token(N, model.num_layers, model.context_length, model.embed_dim)


def padding(params: Any, vocab_size: int) -> int:
    """How many of GPT-2's numbers only fill up its vocabulary to a multiple: in wte, an lm_head of its own, and what
    low-rank adaptation adds to them."""
    rows, thin = params["wte"]["embedding"].shape[0], params.get("lora", {})
    tables = [*params["wte"].values(), *params.get("lm_head", {}).values()]
    tables += [product["a"] for product in thin.get("wte", {}).values()]
    tables += [product["b"] for product in thin.get("lm_head", {}).values()]
    padding: int = sum(table.size // rows * (rows - vocab_size) for table in tables)
    return padding


def matmul_size(params: Any, vocab_size: int) -> int:
    """How many of GPT-2's parameters multiply each token: all but padding, the tables that are only looked up, and
    low-rank products, which are added to matrices once a step."""
    params = {name: part for name, part in params.items() if name != "lora"}
    looked_up = tree.size(params["wpe"]) + ("lm_head" in params) * vocab_size * params["wte"]["embedding"].shape[1]
    return tree.size(params) - padding(params, vocab_size) - looked_up


class Peak(NamedTuple):
    """Dense FLOP/s of one JAX device, with float32 accumulation; None where the hardware has no such matmul."""

    bfloat16: float | None
    float16: float | None
    float32: float | None  # as JAX computes by default: TF32 on NVIDIA from Ampere on, one bfloat16 pass on TPU


def _tensor_cores(half: float, tf32: float) -> Peak:
    return Peak(half * 1e12, half * 1e12, tf32 * 1e12)


def _tpu(bfloat16: float) -> Peak:
    return Peak(bfloat16 * 1e12, None, bfloat16 * 1e12)


# By the beginning of `device_kind`. Vendors' datasheets; where these state TFLOPS with sparsity, half of them.
_PEAKS: dict[str, Peak] = {
    # NVIDIA Blackwell and HGX B200 datasheets: per GPU 4.5 and 2.2 PFLOPS with sparsity; GB200: 5 and 2.5
    "NVIDIA B200": _tensor_cores(2250, 1125),
    "NVIDIA GB200": _tensor_cores(2500, 1250),
    # NVIDIA H100 datasheet: SXM 1,979 and 989, PCIe 1,513 and 756, NVL 1,671 and 835 with sparsity
    "NVIDIA H100": _tensor_cores(989.4, 494.7),
    "NVIDIA H100 PCIe": _tensor_cores(756, 378),
    "NVIDIA H100 NVL": _tensor_cores(835.5, 417.5),
    # H200, GH200 and H800 SXM datasheets: as H100 SXM; H200 NVL: as H100 NVL
    "NVIDIA H200": _tensor_cores(989.4, 494.7),
    "NVIDIA H200 NVL": _tensor_cores(835.5, 417.5),
    "NVIDIA GH200": _tensor_cores(989.4, 494.7),
    "NVIDIA H800": _tensor_cores(989.4, 494.7),
    # NVIDIA H800 PCIe datasheet: as H100 PCIe
    "NVIDIA H800 PCIe": _tensor_cores(756, 378),
    # NVIDIA H20 datasheet: 148 and 74 dense
    "NVIDIA H20": _tensor_cores(148, 74),
    # NVIDIA A100 datasheet: 312 and 156 dense, SXM and PCIe alike; A800 as A100
    "NVIDIA A100": _tensor_cores(312, 156),
    "NVIDIA A100-PCIE": _tensor_cores(312, 156),
    "NVIDIA A100 80GB PCIe": _tensor_cores(312, 156),
    "NVIDIA A800": _tensor_cores(312, 156),
    "NVIDIA A800-PCIE": _tensor_cores(312, 156),
    "NVIDIA A800 80GB PCIe": _tensor_cores(312, 156),
    # Datasheets of A30, A40, A10, RTX A6000: dense
    "NVIDIA A30": _tensor_cores(165, 82),
    "NVIDIA A40": _tensor_cores(149.7, 74.8),
    "NVIDIA A10": _tensor_cores(125, 62.5),
    "NVIDIA RTX A6000": _tensor_cores(154.8, 77.4),
    # NVIDIA A10G datasheet, the A10 of AWS: 70 and 35 dense
    "NVIDIA A10G": _tensor_cores(70, 35),
    # Datasheets of L4 (242 and 120 with sparsity), L40 and L40S (dense)
    "NVIDIA L4": _tensor_cores(121, 60),
    "NVIDIA L40": _tensor_cores(181, 90.5),
    "NVIDIA L40S": _tensor_cores(362, 183),
    # NVIDIA whitepapers of GA102, Ada and RTX Blackwell, tables of peak rates with FP32 accumulate, dense
    "NVIDIA GeForce RTX 3090": _tensor_cores(71, 35.6),
    "NVIDIA GeForce RTX 4090": _tensor_cores(165.2, 82.6),
    "NVIDIA GeForce RTX 5090": _tensor_cores(209.5, 104.8),
    # NVIDIA V100 and T4 datasheets; their tensor cores know float16 only
    "Tesla V100-SXM2": Peak(None, 125e12, 15.7e12),
    "Tesla V100-PCIE": Peak(None, 112e12, 14e12),
    "Tesla T4": Peak(None, 65e12, 8.1e12),
    # cloud.google.com/tpu/docs, per chip; a device of v2 and v3 is one core, half a chip of 45 and 123 TFLOPS
    "TPU v2": _tpu(22.5),
    "TPU v3": _tpu(61.5),
    "TPU v4": _tpu(275),
    "TPU v5 lite": _tpu(197),
    "TPU v5": _tpu(459),
    "TPU v5p": _tpu(459),
    "TPU v6 lite": _tpu(918),
}

# What may follow a name without changing the peak: package and memory. All else (PCIe, MIG slices, Laptop, Ti, D) is
# another device, and no MFU is better than a wrong one.
_SAME = re.compile(r"([ -](SXM\d|\d+GB|HBM\w+))*")


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Dense peak of one device in FLOP/s; None if it isn't known.

    Args:
      device_kind: as `jax.Device.device_kind` gives it, such as "NVIDIA H100 80GB HBM3".
      dtype: of the matmuls: "bfloat16", "float16" or "float32". A float32 matmul at JAX's default precision runs in
        TF32 on NVIDIA GPUs from Ampere on and in bfloat16 on TPUs, and is measured against that peak.
    """
    names = [name for name in _PEAKS if device_kind.startswith(name) and _SAME.fullmatch(device_kind, len(name))]
    if not names or dtype not in Peak._fields:
        return None
    peak: float | None = getattr(_PEAKS[max(names, key=len)], dtype)
    return peak


def mfu(
    tokens_per_second: float, flops_per_token: float, device_kind: str, dtype: str, num_devices: float
) -> float | None:
    """Model FLOPs utilization in [0, 1]: achieved model FLOP/s over the peak of all devices; None if that is unknown.

    Args:
      tokens_per_second: of the whole run, over all devices.
      flops_per_token: from the function of this name.
    """
    peak = peak_flops(device_kind, dtype)
    return tokens_per_second * flops_per_token / (peak * num_devices) if peak else None
