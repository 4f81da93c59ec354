"""Suite `optimizer`: one AdamW update of GPT-2 124M, gradients given, beside PyTorch's fused and foreach AdamW.

Clipping by global norm and decay of kernels on all sides; float32. Nothing is timed before three updates from the same
parameters and gradients agree. Each side is a process of its own, as in `step`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments.bench import machine
from experiments.bench.cases import B1, B2, BABY, CLIP, EPS, GPT2, WEIGHT_DECAY, Case, settings
from experiments.bench.remote import Remote
from experiments.bench.report import Limit, Row
from experiments.bench.step import Disagreement
from experiments.bench.timing import interleave

RATE, DECAYED, UPDATES = 6e-4, "kernels", 3
KINDS = ("fused", "foreach")


def run(quick: bool) -> list[Row]:
    return measure(BABY if quick else GPT2._replace(name="GPT-2 124M", dtype="float32"), rounds=2 if quick else 15)


def measure(case: Case, rounds: int) -> list[Row]:
    """Milliseconds an update.

    Raises:
      Disagreement: the sides don't end with the same parameters.
    """
    machine.say(f"optimizer: {case.name}, {rounds} rounds")
    with contextlib.ExitStack() as stack:
        sides = {"jaxlm": stack.enter_context(Remote("experiments.bench.optimizer:Jaxlm", case))}
        if machine.has("torch"):
            shapes = sides["jaxlm"].call("shapes")
            for kind in KINDS:
                sides[kind] = stack.enter_context(Remote("experiments.bench.optimizer:Peer", shapes, kind))
        values = {name: side.call("values") for name, side in sides.items()}
        for kind in set(sides) - {"jaxlm"}:
            agree(values["jaxlm"], values[kind], kind)

        def block(side: Remote) -> Callable[[], float]:
            return lambda: 1e3 * side.call("seconds")

        found = interleave({name: block(side) for name, side in sides.items()}, rounds)
    what = f"{case.name}: an AdamW update of given gradients"
    limit = Limit("ratio", "<=", 1.5)
    rows = [
        Row("optimizer", what, "ms", found["jaxlm"], f"PyTorch's AdamW, {kind}", found[kind], limit)
        for kind in KINDS
        if kind in found
    ]
    return rows or [Row("optimizer", what, "ms", found["jaxlm"])]


def agree(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], kind: str) -> None:
    """Raises Disagreement unless each parameter's values are near, relative to how far they moved."""
    for path, value in ours.items():
        gap = float(np.abs(value - theirs[path]).max())
        if gap > 1e-3 * UPDATES * RATE:
            raise Disagreement(
                f"{path} of jaxlm and of PyTorch's {kind} AdamW differ by {gap:.3g} after {UPDATES} updates"
            )


def drawn(shapes: Mapping[str, tuple[int, ...]], seed: int, scale: float) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {path: scale * random.standard_normal(shape, np.float32) for path, shape in shapes.items()}


class Jaxlm:
    def __init__(self, case: Case) -> None:
        import jax

        from jaxlm import config, tree
        from jaxlm.model import gpt2
        from jaxlm.optim import chain
        from jaxlm.training.host import keep_memory

        keep_memory()  # as the doors do
        c = settings(case)
        c.optimizer.add_decayed_weights = {"weight_decay": WEIGHT_DECAY, "where": DECAYED}
        c.optimizer.scale_by_learning_rate = {"peak": RATE, "schedule": "constant"}
        cfg = config.resolve(c)
        like = gpt2.shapes(cfg.model)
        self._paths, treedef = tree.paths(like), jax.tree.structure(like)
        self._shapes = {path: leaf.shape for path, leaf in zip(self._paths, jax.tree.leaves(like), strict=True)}

        def placed(arrays: Mapping[str, np.ndarray]) -> Any:
            return jax.device_put(jax.tree.unflatten(treedef, [arrays[path] for path in self._paths]))

        structure, hparams = config.split(cfg)
        self._numbers, self._grads = hparams.optimizer, placed(drawn(self._shapes, 1, 1e-3))

        def make(numbers: Any) -> Any:
            return chain.build(structure.optimizer.to_dict(), numbers, cfg.steps)

        def update(numbers: Any, grads: Any, state: Any, params: Any) -> Any:
            import optax

            updates, state = make(numbers).update(grads, state, params)
            return state, optax.apply_updates(params, updates)

        params = placed(drawn(self._shapes, 0, 0.02))
        self._state = jax.jit(lambda numbers, params: make(numbers).init(params))(self._numbers, params), params
        self._update = jax.jit(update, donate_argnums=(2, 3))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def values(self) -> dict[str, np.ndarray]:
        """The first numbers of each parameter after some updates."""
        import jax

        for _ in range(UPDATES):
            self.seconds()
        leaves = jax.tree.leaves(self._state[1])
        return {path: np.asarray(leaf.reshape(-1)[:64]) for path, leaf in zip(self._paths, leaves, strict=True)}

    def seconds(self) -> float:
        import jax

        begin = time.perf_counter()
        self._state = jax.block_until_ready(self._update(self._numbers, self._grads, *self._state))
        return time.perf_counter() - begin


class Peer:
    def __init__(self, shapes: Mapping[str, tuple[int, ...]], kind: str) -> None:
        import torch

        torch.set_num_threads(machine.cores())
        grads = drawn(shapes, 1, 1e-3)
        self._params = {path: torch.nn.Parameter(torch.from_numpy(x)) for path, x in drawn(shapes, 0, 0.02).items()}
        for path, parameter in self._params.items():
            parameter.grad = torch.from_numpy(grads[path])
        self._grads = {path: grads[path].copy() for path in grads}
        decayed = [p for path, p in self._params.items() if path.endswith("/kernel")]
        others = [p for path, p in self._params.items() if not path.endswith("/kernel")]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(B1, B2), eps=EPS, **{kind: True})

    def values(self) -> dict[str, np.ndarray]:
        for _ in range(UPDATES):
            self.seconds()
        return {path: p.detach().reshape(-1)[:64].numpy().copy() for path, p in self._params.items()}

    def seconds(self) -> float:
        import torch

        for path, parameter in self._params.items():  # clipping has changed them
            assert parameter.grad is not None
            parameter.grad.copy_(torch.from_numpy(self._grads[path]))
        begin = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(self._params.values(), CLIP)
        self._optimizer.step()
        return time.perf_counter() - begin
