"""The compiled functions of one structure: for a run alone, or for runs side by side in one program, as lanes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from jaxlm.config import Hparams
from jaxlm.data.batches import Batch
from jaxlm.evals import perplexity
from jaxlm.model.losses import TokenSums
from jaxlm.optim.wrappers import evaluation_params
from jaxlm.training import parallel, step
from jaxlm.training.step import PyTree, State


class Steps:
    """What runs of one structure are trained and evaluated by; compiled once, however many come.

    Of N lanes, states, hyperparameters, batches and metrics have a leading axis [N, ...]; fewer runs than lanes are
    filled up with the last one. Alone (lanes 0) they have none, and each list below holds one.

    Args:
      cfg: of any of the runs, resolved.
    """

    def __init__(self, cfg: FrozenConfigDict, lanes: int = 0):
        self.lanes = lanes
        structure, hparams = step.split(cfg)
        program = step.build(structure)
        alone = parallel.mesh(cfg.parallel, cfg.model, cfg.data.batch_size, cfg.data.micro_batches)
        self.mesh = parallel.lane_mesh(lanes) if lanes else alone
        each: Callable[..., Any] = jax.vmap if lanes else lambda fn, **_: fn
        compiled = functools.partial(parallel.compile, mesh=self.mesh)
        shapes = jax.eval_shape(program.init, jax.random.key(0), hparams)
        first = jax.sharding.SingleDeviceSharding(self.mesh.devices.flat[0])
        self._place = jax.tree.map(lambda _: first, shapes) if lanes else parallel.shardings(shapes, alone)
        out = None if lanes else (self._place, parallel.laid_out(alone))
        self._one = compiled(each(program.train_step), donate=(1,), out=out)
        self._many = compiled(each(parallel.repeat(program.train_step)), donate=(1,), out=out)
        self._evaluations = {
            name: compiled(each(functools.partial(program.eval_step, of=name), in_axes=(0, None)))
            for name in jax.eval_shape(evaluation_params, shapes.opt_state, shapes.params)
        }
        self._init = jax.jit(program.init, out_shardings=self._place)
        self.like = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, self._place
        )
        """The state of one run: its shapes, dtypes, and where it lies before `together`."""
        self._stack = jax.jit(lambda *states: jax.tree.map(lambda *x: jax.numpy.stack(x), *states))
        self._pick = jax.jit(lambda states, i: jax.tree.map(lambda x: x[i], states))

    def init(self, seed: int, hparams: Hparams, params: PyTree | None) -> State:
        """The state that a run begins with: of these parameters, or of some drawn from its seed."""
        placed = None if params is None else jax.device_put(params, self._place.params)
        return self._init(jax.random.key(seed), hparams, placed)

    def advance(self, hparams: Hparams, states: State, batch: PyTree, count: int) -> tuple[State, PyTree]:
        """So many steps; the states are given up."""
        return (self._one if count == 1 else self._many)(hparams, states, batch)

    def evaluate(self, states: State, batches: Iterable[Batch]) -> dict[str, TokenSums]:
        """The weighted sums over batches, by the name of `wrappers.evaluation_params`."""

        def placed() -> Iterator[PyTree]:
            yield from (parallel.put(batch, self.mesh, shared=True) for batch in batches)

        return {
            name: perplexity.sums(functools.partial(evaluation, states), placed())
            for name, evaluation in self._evaluations.items()
        }

    def together(self, states: Sequence[State]) -> State:
        """The states of runs, each like `like`, as one argument of `advance`."""
        if not self.lanes:
            return states[0]
        return jax.device_put(self._stack(*self._filled(states)), parallel.laid_out(self.mesh))

    def one(self, states: State, i: int) -> State:
        """The state of run i."""
        return jax.device_put(self._pick(states, i), self._place) if self.lanes else states

    def stacked(self, values: Sequence[PyTree]) -> PyTree:
        """NumPy arrays of each run, as one argument of `advance`."""
        return jax.tree.map(lambda *x: np.stack(x), *self._filled(values)) if self.lanes else values[0]

    def part(self, values: PyTree, i: int) -> PyTree:
        """Run i's of the NumPy arrays that `advance` or `evaluate` gave."""
        return jax.tree.map(lambda x: x[i], values) if self.lanes else values

    def _filled(self, values: Sequence[Any]) -> list[Any]:
        """As many as there are lanes."""
        return [*values, *[values[-1]] * (self.lanes - len(values))]
