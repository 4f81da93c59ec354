"""Suite `decode`: greedy generation by jaxlm beside transformers' `generate`, with the same weights and prompts.

Nothing is timed before both have given the same tokens. Each side is a process of its own, as in `step`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments.bench import machine
from experiments.bench.cases import BABY, GPT2, Case, settings
from experiments.bench.remote import Remote
from experiments.bench.report import Limit, Row, single
from experiments.bench.step import Disagreement
from experiments.bench.timing import interleave

BATCHES = (1, 8)
PROMPT, NEW = 64, 128  # tokens
PEER = "transformers"
LOUDER = 2


def run(quick: bool) -> list[Row]:
    case = BABY if quick else GPT2._replace(name="GPT-2 124M, fp32", vocab_size=50257, dtype="float32")
    return measure(case, rounds=1 if quick else 7)


def measure(case: Case, rounds: int, batches: tuple[int, ...] = BATCHES, new: int = NEW) -> list[Row]:
    """Tokens per second for each batch size.

    Raises:
      Disagreement: the sides don't give the same tokens.
    """
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        machine.say(f"decode: {case.name}")
        sides = {"jaxlm": stack.enter_context(Remote("experiments.bench.decode:Jaxlm", case))}
        if machine.has("torch", "transformers"):
            weights = sides["jaxlm"].call("weights")
            sides[PEER] = stack.enter_context(Remote("experiments.bench.decode:Peer", case, weights))
            del weights
        else:
            machine.say("PyTorch and transformers are not both here: jaxlm stands alone, and unchecked")
        for batch in batches:
            prompts = np.random.default_rng(batch).integers(0, case.vocab_size, (batch, PROMPT)).tolist()
            machine.say(f"decode: batch {batch}: {rounds} rounds")
            first = {name: side.call("generate", prompts, new) for name, side in sides.items()}
            if PEER in sides:
                agree(first["jaxlm"][0], first[PEER][0])

            def block(side: Remote, prompts: list[list[int]] = prompts) -> Callable[[], float]:
                return lambda: len(prompts) * new / side.call("generate", prompts, new)[1]

            found = interleave({name: block(side) for name, side in sides.items()}, rounds)
            peer = PEER if PEER in sides else ""
            what = f"{case.name}, batch {batch}"
            beside = single(first[PEER][1]) if peer else None
            limit = Limit("ratio", ">=", 1.0)
            rows.append(Row("decode", f"{what}: tokens per second", "", found["jaxlm"], peer, found.get(PEER), limit))
            rows.append(Row("decode", f"{what}: first call", "s", single(first["jaxlm"][1]), peer, beside))
    return rows


def agree(ours: list[list[int]], theirs: list[list[int]]) -> None:
    """Raises Disagreement unless all tokens are the same, row by row."""
    for b, (a, other) in enumerate(zip(ours, theirs, strict=True)):
        if a != other:
            same = next((n for n, pair in enumerate(zip(a, other)) if pair[0] != pair[1]), min(len(a), len(other)))
            raise Disagreement(f"row {b}: of jaxlm's {len(a)} tokens and {PEER}'s {len(other)}, the first {same} agree")


class Jaxlm:
    def __init__(self, case: Case) -> None:
        import jax

        from jaxlm import config
        from jaxlm.model import gpt2
        from jaxlm.training.host import keep_memory

        keep_memory()  # as the doors do
        self._case = case
        self._model = gpt2.build(config.resolve(settings(case)).model)
        params = jax.jit(self._model.init)(jax.random.key(0))
        # as initialised, blocks say little, and the tied head repeats the last token, whatever the weights
        params["h"] = jax.tree.map(lambda x: LOUDER * x, params["h"])
        self._params = params
        self._unstacked = self._model.unstack(self._params)

    def weights(self) -> dict[str, np.ndarray]:
        """Parameters as transformers names and shapes them."""
        import jax

        from jaxlm.model import huggingface

        return huggingface.tensors(jax.tree.map(np.asarray, self._params), self._case.vocab_size)

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[list[int]], float]:
        """(tokens, seconds). No id ends a row."""
        from jaxlm.model import decode, sampling

        begin = time.perf_counter()
        completions = decode.complete(
            self._model,
            self._unstacked,
            prompts,
            [0] * len(prompts),
            max_tokens=new,
            context_length=self._case.context_length,
            vocab_size=self._case.vocab_size,
            end_of_text=-1,
            sampling=sampling.Sampling(temperature=0),
        )
        return [completion.tokens for completion in completions], time.perf_counter() - begin


class Peer:
    def __init__(self, case: Case, weights: Mapping[str, np.ndarray]) -> None:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.set_num_threads(machine.cores())
        shape: Any = {
            **dict(n_layer=case.num_layers, n_head=case.num_heads, n_embd=case.embed_dim),
            **dict(n_positions=case.context_length, vocab_size=case.vocab_size, bos_token_id=0, eos_token_id=None),
            # the same function as its default "gelu_new", but one kernel where that is seven
            "activation_function": "gelu_pytorch_tanh",
        }
        self._model: Any = GPT2LMHeadModel(GPT2Config(**shape)).eval()
        self._model.load_state_dict({name: torch.tensor(x) for name, x in weights.items()}, strict=False)  # tied head

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[list[int]], float]:
        import torch

        ids = torch.tensor(prompts)
        begin = time.perf_counter()
        every = dict(attention_mask=torch.ones_like(ids), pad_token_id=0)
        out = self._model.generate(ids, do_sample=False, max_new_tokens=new, **every)
        return out[:, ids.shape[1] :].tolist(), time.perf_counter() - begin
