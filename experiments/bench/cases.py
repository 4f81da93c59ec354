"""What is trained: shapes, optimizer and tokens, the same numbers for every side. Imports neither JAX nor PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxlm import config, data

PEAK, WARMUP, FINAL, STEPS = 1e-3, 10, 0.1, 1000  # learning rate: linear warmup, then a cosine to FINAL * PEAK
B1, B2, EPS, WEIGHT_DECAY, CLIP = 0.9, 0.99, 1e-8, 0.1, 1.0
DECAYED = "kernel$|embedding$"  # nanoGPT's mask: all matrices
_TEXT = 2**20  # bytes


class Case(NamedTuple):
    name: str
    num_layers: int
    num_heads: int
    embed_dim: int
    context_length: int
    batch_size: int
    vocab_size: int = 65
    dtype: str = "float32"
    attention: str = "auto"
    unroll: bool = False
    micro_batches: int = 1
    loss_chunks: int = 1

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.context_length


TINY = Case("tiny", 4, 4, 128, 64, 12, unroll=True)  # as configs/shakespeare_char.py:cpu
BABY = Case("baby", 6, 6, 384, 256, 16, unroll=True)  # as configs/shakespeare_char.py
WIDE = Case("two layers under GPT-2's vocabulary", 2, 4, 256, 256, 8, vocab_size=50304, unroll=True)
GPT2 = Case("GPT-2 124M", 12, 12, 768, 1024, 64, vocab_size=50304, dtype="bfloat16", unroll=True, loss_chunks=2)
GPT2_350M = GPT2._replace(name="GPT-2 350M", num_layers=24, num_heads=16, embed_dim=1024)
GPT2_XL = GPT2._replace(name="GPT-2 1.5B", num_layers=48, num_heads=25, embed_dim=1600, batch_size=32)
NANO = Case("nano", 1, 2, 32, 16, 4)  # for tests: everything runs, nothing is measured


def settings(case: Case) -> ConfigDict:
    """jaxlm's config of a case. Dropout is 0; the data section is not used but for the batch size."""
    c = config.default()
    c.steps = STEPS
    c.model.update(num_layers=case.num_layers, num_heads=case.num_heads, embed_dim=case.embed_dim)
    c.model.update(context_length=case.context_length, vocab_size=case.vocab_size, dtype=case.dtype)
    c.model.update(attention=case.attention, unroll=case.unroll, loss_chunks=case.loss_chunks)
    c.data.update(batch_size=case.batch_size, micro_batches=case.micro_batches)
    c.parallel.data = 1
    c.optimizer.clip_by_global_norm = {"max_norm": CLIP}
    c.optimizer.scale_by_adam = {"b1": B1, "b2": B2, "eps": EPS}
    c.optimizer.add_decayed_weights = {"weight_decay": WEIGHT_DECAY, "where": DECAYED}
    schedule = {"schedule": "warmup_cosine", "warmup": float(WARMUP), "final": FINAL}
    c.optimizer.scale_by_learning_rate = {"peak": PEAK, **schedule}
    return c


def learning_rate(step: int) -> float:
    """Of the update after `step` completed ones: what the schedule in `settings` is to be, for the other side."""
    if step < WARMUP:
        return PEAK * step / WARMUP
    progress = min((step - WARMUP) / (STEPS - WARMUP), 1.0)
    return PEAK * (FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * progress)))


def batches(case: Case) -> data.Batches:
    """Batch n of a case: of the standard library's source, its bytes folded into a small vocabulary, so that there is
    something to learn; of Zipf-distributed ids for a large one, which needs a tokenizer that is not at hand."""
    if case.vocab_size > 256:
        ids = np.random.default_rng(0).zipf(1.2, 2**22) % case.vocab_size
        return data.Batches(data.Windows(ids.astype(np.uint16), case.context_length), case.batch_size, seed=0)
    text = bytearray()
    for document in data.open_source("stdlib").read():
        text += document.text.encode()
        if len(text) >= _TEXT:
            break
    tokens = np.frombuffer(text, np.uint8).astype(np.uint16) % case.vocab_size
    return data.Batches(data.Windows(tokens, case.context_length), case.batch_size, seed=0)
