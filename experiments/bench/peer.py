"""The peer: a plain PyTorch loop over transformers' GPT-2, as one would write it after nanoGPT.

python -m experiments.bench.peer FILE   # writes a first loss of the tiny model: for the start-up suite
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from experiments.bench import cases, machine
from experiments.bench.cases import Case


class Peer:
    """A model in training: SDPA, AdamW on all cores, gradients clipped, the schedule of `cases`.

    Args:
      weights: the parameters to start from, jaxlm's by transformers' names; None draws others.
      compile: torch.compile of each block and of head and loss. Not of the whole model: there, before torch 2.14,
        transformers makes a mask, and flash attention does not take one.
    """

    def __init__(self, case: Case, weights: Mapping[str, np.ndarray] | None, compile: bool = False) -> None:
        torch.set_num_threads(machine.cores())
        torch.set_float32_matmul_precision("high" if case.dtype == "bfloat16" else "highest")
        self.case, self._device = case, "cuda" if case.dtype == "bfloat16" and torch.cuda.is_available() else "cpu"
        settings: Any = {
            **dict(n_layer=case.num_layers, n_head=case.num_heads, n_embd=case.embed_dim),
            **dict(n_positions=case.context_length, vocab_size=case.vocab_size, bos_token_id=0, eos_token_id=0),
            **dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, attn_implementation="sdpa"),
            # the same function as its default "gelu_new", but one kernel where that is seven
            "activation_function": "gelu_pytorch_tanh",
        }
        torch.manual_seed(0)
        model: Any = GPT2LMHeadModel(GPT2Config(**settings))
        self._model = model.to(self._device).train()
        self._optimizer_kind = self._faster_optimizer()
        self._optimizer = self._make_optimizer(self._optimizer_kind)
        if weights is not None:
            names = self._model.load_state_dict({name: torch.tensor(x) for name, x in weights.items()}, strict=False)
            if names.unexpected_keys or names.missing_keys != ["lm_head.weight"]:  # tied
                raise ValueError(f"weights that don't fit: {names}")
        self._loss = _loss
        if compile:
            for block in self._model.transformer.h:
                block.compile()
            self._loss = torch.compile(_loss)
        self._batches = cases.batches(case)

    def facts(self) -> str:
        """The kind of optimizer that was the faster."""
        return self._optimizer_kind

    def first(self) -> tuple[list[float], float]:
        """Step 0."""
        return self.run(0, 1)

    def run(self, start: int, steps: int) -> tuple[list[float], float]:
        """(losses, seconds) of steps start, ..., start + steps - 1. Losses are fetched at the end."""
        batches = [self._batches[n] for n in range(start, start + steps)]
        losses = []
        with _fastest_attention(self._device):
            self._synchronize()
            begin = time.perf_counter()
            for n, batch in enumerate(batches, start):
                losses.append(self._step(n, batch))
            values: list[float] = torch.stack(losses).tolist()
            self._synchronize()
            return values, time.perf_counter() - begin

    def _step(self, n: int, batch: Mapping[str, np.ndarray]) -> torch.Tensor:
        inputs, targets = (self._put(batch[name]) for name in ("inputs", "targets"))
        parts = self.case.micro_batches
        total = torch.zeros((), device=self._device)
        for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
            with torch.autocast(self._device, torch.bfloat16, enabled=self.case.dtype == "bfloat16"):
                hidden = self._model.transformer(x, use_cache=False).last_hidden_state
                loss = self._loss(hidden, self._model.lm_head.weight, y) / parts
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), cases.CLIP)
        for group in self._optimizer.param_groups:
            group["lr"] = cases.learning_rate(n)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def _put(self, x: np.ndarray) -> torch.Tensor:
        host = torch.from_numpy(x).long()
        return host if self._device == "cpu" else host.pin_memory().to(self._device, non_blocking=True)

    def _synchronize(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    def _make_optimizer(self, kind: str) -> torch.optim.Optimizer:
        parameters = list(self._model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": cases.WEIGHT_DECAY},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, 0.0, (cases.B1, cases.B2), cases.EPS, **{kind: True})

    def _faster_optimizer(self) -> str:
        """Of "fused" and "foreach". Timed on random gradients at learning rate 0, which changes no parameter."""
        found: dict[str, float] = {}
        for parameter in self._model.parameters():
            parameter.grad = 1e-3 * torch.randn_like(parameter)
        for kind in ("foreach", "fused"):
            optimizer = self._make_optimizer(kind)
            optimizer.step()
            times = []
            for _ in range(5):
                self._synchronize()
                begin = time.perf_counter()
                optimizer.step()
                self._synchronize()
                times.append(time.perf_counter() - begin)
            found[kind] = min(times)
        self._model.zero_grad(set_to_none=True)
        return min(found, key=found.__getitem__)


def _loss(hidden: torch.Tensor, embedding: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, embedding)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@contextlib.contextmanager
def _fastest_attention(device: str):
    """On a GPU, cuDNN's attention before flash's: on Hopper it is the faster, and not PyTorch's own first choice."""
    with contextlib.ExitStack() as stack:
        if device == "cuda":
            from torch.nn.attention import SDPBackend, sdpa_kernel

            order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
            stack.enter_context(sdpa_kernel([*order, SDPBackend.MATH], set_priority=True))
        yield


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(f"{Peer(cases.TINY, None).first()[0][0]}\n")
