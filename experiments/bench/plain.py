"""The limit: GPT-2 and AdamW by hand in plain jax.numpy, one jitted function, nothing of jaxlm's, Flax's or Optax's."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import cases
from experiments.bench.cases import Case
from jaxlm.training.host import keep_memory


class Plain:
    """A model in training, of float32 and without dropout.

    Args:
      weights: the parameters to start from, by transformers' names.
    """

    def __init__(self, case: Case, weights: Mapping[str, np.ndarray]) -> None:
        keep_memory()
        self.case = case
        params = {name.removeprefix("transformer."): jnp.asarray(x) for name, x in weights.items()}
        zeros = jax.tree.map(jnp.zeros_like, params)
        self._state: Any = (params, zeros, jax.tree.map(jnp.zeros_like, params), jnp.int32(0))
        self._step: Any = jax.jit(_make_step(case), donate_argnums=0)
        self._batches = cases.batches(case)

    def first(self) -> tuple[list[float], float]:
        """Step 0."""
        return self.run(0, 1)

    def run(self, start: int, steps: int) -> tuple[list[float], float]:
        """(losses, seconds) of steps start, ..., start + steps - 1; each fetched while the next one runs."""
        batches = [self._batches[n] for n in range(start, start + steps)]
        losses: list[float] = []
        pending = None
        begin = time.perf_counter()
        for batch in batches:
            self._state, loss = self._step(self._state, batch["inputs"], batch["targets"])
            if pending is not None:
                losses.append(float(pending))
            pending = loss
        assert pending is not None
        losses.append(float(pending))
        return losses, time.perf_counter() - begin


def _make_step(case: Case):
    H, D, T = case.num_heads, case.embed_dim, case.context_length
    causal = np.tril(np.ones((T, T), bool))

    def norm(p, name, x):
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def dense(p, name, x):
        return x @ p[f"{name}.weight"] + p[f"{name}.bias"]

    def block(p, name, x):
        B = x.shape[0]
        q, k, v = jnp.split(dense(p, f"{name}.attn.c_attn", norm(p, f"{name}.ln_1", x)), 3, axis=-1)
        q, k, v = (y.reshape(B, T, H, D // H).transpose(0, 2, 1, 3) for y in (q, k, v))
        scores = jnp.where(causal, q @ k.swapaxes(2, 3) * (D // H) ** -0.5, -1e30)
        y = (jax.nn.softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(B, T, D)
        x = x + dense(p, f"{name}.attn.c_proj", y)
        y = jax.nn.gelu(dense(p, f"{name}.mlp.c_fc", norm(p, f"{name}.ln_2", x)), approximate=True)
        return x + dense(p, f"{name}.mlp.c_proj", y)

    def loss_of(p, inputs, targets):
        x = p["wte.weight"][inputs] + p["wpe.weight"]
        for n in range(case.num_layers):
            x = block(p, f"h.{n}", x)
        logits = norm(p, "ln_f", x) @ p["wte.weight"].T
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)

    def learning_rate(n):
        progress = (n - cases.WARMUP) / (cases.STEPS - cases.WARMUP)
        cosine = cases.FINAL + (1 - cases.FINAL) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return cases.PEAK * jnp.where(n < cases.WARMUP, n / cases.WARMUP, cosine)

    def step(state, inputs, targets):
        p, first, second, n = state
        loss, grads = jax.value_and_grad(loss_of)(p, inputs, targets)
        length = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
        scale = jnp.minimum(1.0, cases.CLIP / length)
        grads = jax.tree.map(lambda g: g * scale, grads)
        first = jax.tree.map(lambda m, g: cases.B1 * m + (1 - cases.B1) * g, first, grads)
        second = jax.tree.map(lambda v, g: cases.B2 * v + (1 - cases.B2) * g * g, second, grads)
        c1, c2, rate = 1 - cases.B1 ** (n + 1), 1 - cases.B2 ** (n + 1), learning_rate(n)

        def moved(w, m, v):
            update = (m / c1) / (jnp.sqrt(v / c2) + cases.EPS)
            return w - rate * (update + (cases.WEIGHT_DECAY * w if w.ndim > 1 else 0))

        return (jax.tree.map(moved, p, first, second), first, second, n + 1), loss

    return step
