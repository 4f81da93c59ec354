"""The compiled functions of one structure: for a run alone, over devices by jit or pmap, or for runs side by side in
one program, as lanes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import FrozenConfigDict

from jaxlm import functions, tree
from jaxlm.config import Hparams
from jaxlm.data.batches import Batch
from jaxlm.evals import perplexity
from jaxlm.model.losses import TokenSums
from jaxlm.optim.wrappers import evaluation_params
from jaxlm.training import devices, parallel, step
from jaxlm.training.step import Program, PyTree, State


def build(cfg: FrozenConfigDict, lanes: int = 0) -> Steps:
    """What runs of one structure are trained and evaluated by; compiled once, however many come in this process.

    Args:
      cfg: of any of the runs, resolved.
      lanes: that many at a time; 0: one alone.

    Raises:
      ConfigError: the devices are not as the config's `parallel` section wants them.
    """
    structure, code, size = step.split(cfg)[0], functions.digest(cfg, "optimizer."), cfg.data.batch_size
    return _built(_Asked(structure, code, cfg.parallel, size, lanes, tuple(jax.devices()), cfg))


@dataclasses.dataclass(frozen=True)
class _Asked:
    """All that compiled functions depend on, and one of the configs that they are for."""

    structure: FrozenConfigDict
    code: str  # of the optimizer's functions: a module may be loaded again, with others of the same names
    parallel: FrozenConfigDict
    batch_size: int
    lanes: int
    devices: tuple[jax.Device, ...]
    cfg: FrozenConfigDict = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=4)
def _built(asked: _Asked) -> Steps:
    if asked.lanes:
        return Lanes(asked.cfg, asked.lanes)
    return Replicas(asked.cfg) if asked.parallel.mode == "pmap" else Alone(asked.cfg)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["names"])
@dataclasses.dataclass(frozen=True)
class Packed:
    """Metrics of steps as one array: a fetch of eight takes several times as long."""

    values: jax.Array  # float32[..., M]
    names: tuple[str, ...]


class Steps:
    """What `build` gives. Here the lists hold one run's.

    Attributes:
      mesh: of the devices.
      like: the state of one run: its shapes, dtypes, and where it lies before `together`.
      rows: those of each batch that this process holds.
    """

    mesh: Mesh
    like: State
    rows: slice

    def _begin(self, program: Program, hparams: Hparams, place: Callable[[State], PyTree]) -> None:
        """Settles where the state of a run lies."""
        shapes = jax.eval_shape(program.init, jax.random.key(0), hparams)
        self._place = place(shapes)
        self._init = jax.jit(program.init, out_shardings=self._place)
        self.like = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, self._place
        )

    def _compile(self, program: Program, trains: Callable[..., Any], evaluates: Callable[..., Any]) -> None:
        def train_step(hparams: Hparams, state: State, batch: PyTree) -> tuple[State, Packed]:
            state, metrics = program.train_step(hparams, state, batch)
            return state, Packed(jnp.stack([*metrics.values()]), (*metrics,))

        self._one, self._many = trains(train_step), trains(parallel.repeat(train_step))
        self._evaluations = {
            name: evaluates(functools.partial(program.eval_step, of=name))
            for name in jax.eval_shape(evaluation_params, self.like.opt_state, self.like.params)
        }

    def init(self, seed: int, hparams: Hparams, params: PyTree | None) -> State:
        """The state that a run begins with: of these parameters, or of some drawn from its seed."""
        placed = None if params is None else jax.device_put(params, self._place.params)
        return self._init(jax.random.key(seed), hparams, placed)

    def advance(self, hparams: Hparams, states: State, batch: PyTree, count: int) -> tuple[State, Packed]:
        """So many steps; the states are given up."""
        return (self._one if count == 1 else self._many)(hparams, states, batch)

    def fetch(self, metrics: Packed) -> dict[str, np.ndarray]:
        """Those that `advance` gave, once they are there: each [] or [steps], of lanes with a leading axis."""
        values = np.asarray(metrics.values)
        return {name: values[..., i] for i, name in enumerate(metrics.names)}

    def evaluate(self, states: State, batches: Iterable[Batch]) -> dict[str, TokenSums]:
        """The weighted sums over batches, by the name of `wrappers.evaluation_params`."""
        return {
            name: perplexity.sums(functools.partial(evaluation, states), map(self._shared, batches))
            for name, evaluation in self._evaluations.items()
        }

    def together(self, states: Sequence[State]) -> State:
        """The states of runs, each like `like`, as one argument of `advance`."""
        return states[0]

    def one(self, states: State, i: int) -> State:
        """The state of run i."""
        return states

    def stacked(self, values: Sequence[PyTree]) -> PyTree:
        """Hyperparameters of each run, as one argument of `advance`."""
        return jax.device_put(values[0], parallel.everywhere(self.mesh))

    def batch(self, batches: Sequence[Batch]) -> PyTree:
        """A host batch of each run, its `rows` of [B, T] or [steps, B, T], as one argument of `advance`."""
        return self._shared(batches[0])

    def _shared(self, batch: Batch) -> PyTree:
        """A host batch [B, T] on the devices: the same of all runs, and whole in each process."""
        return parallel.put(batch, self.mesh)

    def part(self, values: PyTree, i: int) -> PyTree:
        """Run i's of the NumPy arrays that `fetch` or `evaluate` gave."""
        return values


class Alone(Steps):
    """Of one run, by jit over a mesh.

    Args:
      mesh: other than the config's own.
    """

    def __init__(self, cfg: FrozenConfigDict, mesh: Mesh | None = None):
        self._cfg, self.mesh = cfg, mesh or devices.mesh(cfg)
        self.rows = parallel.rows_here(self.mesh, cfg.data.batch_size)
        structure, self._hparams = step.split(cfg)
        program = step.build(structure, placement=parallel.placing(self.mesh))
        self._begin(program, self._hparams, lambda state: parallel.shardings(state, self.mesh))
        whole = parallel.laid_out(self.mesh)
        compiled = functools.partial(parallel.compile, mesh=self.mesh, deterministic=cfg.parallel.deterministic)
        self._compile(program, functools.partial(compiled, donate=(1,), out=(self._place, whole)), compiled)

    def lower(self, platform: str | None = None, like: Batch | None = None) -> jax.stages.Lowered:
        """A step for the compiler, to ask of its memory or its text; nothing is allocated.

        Args:
          platform: "cuda" for a mesh of GPUs that are not here.
          like: a batch, of packed rows maybe; by default of running text.
        """
        whole, size = parallel.everywhere(self.mesh), (self._cfg.data.batch_size, self._cfg.model.context_length)
        rows = None if self.mesh.size == 1 else NamedSharding(self.mesh, PartitionSpec(parallel.ROWS))  # as `batch`
        kinds: dict[str, Any] = {"inputs": np.int32, "targets": np.int32, "weights": np.float32}
        if like is not None:
            kinds = {name: x.dtype for name, x in like.items()}
        batch = {name: jax.ShapeDtypeStruct(size, kind, sharding=rows) for name, kind in kinds.items()}
        hparams = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), self._hparams)
        traced = self._one.trace(hparams, self.like, batch)
        return traced.lower(lowering_platforms=(platform,) if platform else None)

    def batch(self, batches: Sequence[Batch]) -> PyTree:
        return parallel.put(batches[0], self.mesh, first=self.rows.start, rows=self._cfg.data.batch_size)


class Lanes(Steps):
    """Of so many runs, each a lane. Hyperparameters, batches, metrics and states have a leading axis [N, ...]; what is
    stacked by layer is [L, N, ...], so that a layer is in one piece for all lanes. Along N they are divided among
    devices. Fewer runs than lanes are filled up with the last one."""

    def __init__(self, cfg: FrozenConfigDict, lanes: int):
        self._count, self.rows = lanes, slice(0, cfg.data.batch_size)
        self.mesh = devices.of_lanes(lanes)
        structure, hparams = step.split(cfg)
        program = step.build(structure)
        first = jax.sharding.SingleDeviceSharding(self.mesh.devices.flat[0])
        self._begin(program, hparams, lambda state: jax.tree.map(lambda _: first, state))
        axes = jax.tree_util.tree_map_with_path(lambda path, x: int(tree.of_layers(path) and x.ndim > 0), self.like)
        whole = parallel.laid_out(self.mesh)
        specs = PartitionSpec(*whole.spec), PartitionSpec(None, *whole.spec)
        self._lies = jax.tree.map(lambda axis: NamedSharding(self.mesh, specs[axis]), axes)
        deterministic = cfg.parallel.deterministic
        compiled = functools.partial(parallel.compile, mesh=self.mesh, mode="lanes", deterministic=deterministic)
        steps = {"in_axes": (0, axes, 0), "out_axes": (axes, 0), "donate": (1,), "out": (self._lies, whole)}
        self._compile(program, functools.partial(compiled, **steps), functools.partial(compiled, in_axes=(axes, None)))
        self._stack = jax.jit(lambda *states: jax.tree.map(lambda axis, *x: jnp.stack(x, axis), axes, *states))
        self._pick = jax.jit(lambda states, i: jax.tree.map(lambda axis, x: x[:, i] if axis else x[i], axes, states))

    def together(self, states: Sequence[State]) -> State:
        return jax.device_put(self._stack(*self._filled(states)), self._lies)

    def one(self, states: State, i: int) -> State:
        return jax.device_put(self._pick(states, i), self._place)

    def stacked(self, values: Sequence[PyTree]) -> PyTree:
        return jax.device_put(self._stacked(values), parallel.laid_out(self.mesh))

    def batch(self, batches: Sequence[Batch]) -> PyTree:
        return parallel.put(self._stacked(batches), self.mesh)

    def _stacked(self, values: Sequence[PyTree]) -> PyTree:
        return jax.tree.map(lambda *x: np.stack(x), *self._filled(values))

    def _shared(self, batch: Batch) -> PyTree:
        return parallel.put(batch, self.mesh, shared=True)

    def part(self, values: PyTree, i: int) -> PyTree:
        return jax.tree.map(lambda x: x[i], values)

    def _filled(self, values: Sequence[Any]) -> list[Any]:
        """As many as there are lanes."""
        return [*values, *[values[-1]] * (self._count - len(values))]


class Replicas(Steps):
    """Of one run, by pmap: each device holds the whole state, and its rows of a batch. What `advance` takes and gives
    has a leading axis of devices; `like` and what is saved have none."""

    def __init__(self, cfg: FrozenConfigDict):
        self.rows = slice(0, cfg.data.batch_size)
        self.mesh = devices.replicas(cfg)
        structure, hparams = step.split(cfg)
        program = step.build(structure, axis=parallel.REPLICAS)
        first = jax.sharding.SingleDeviceSharding(self.mesh.devices.flat[0])
        self._begin(program, hparams, lambda state: jax.tree.map(lambda _: first, state))
        compiled = functools.partial(parallel.compile, mesh=self.mesh, mode="pmap")
        self._compile(program, functools.partial(compiled, in_axes=(None, 0, 0), donate=(1,)), compiled)

    def together(self, states: Sequence[State]) -> State:
        def copies(x: jax.Array) -> jax.Array:
            return jnp.broadcast_to(x, (self.mesh.size, *x.shape))

        spread = jax.jit(functools.partial(jax.tree.map, copies), out_shardings=parallel.laid_out(self.mesh))
        return spread(jax.device_put(states[0], parallel.everywhere(self.mesh)))

    def one(self, states: State, i: int) -> State:
        return jax.device_put(jax.tree.map(lambda x: x[0], states), self._place)

    def _shared(self, batch: Batch) -> PyTree:
        n = self.mesh.size

        def divided(x: np.ndarray) -> np.ndarray:
            """[devices, ..., rows, T]"""
            *before, rows, T = x.shape
            return np.moveaxis(x.reshape(*before, n, rows // n, T), -3, 0)

        return parallel.put({name: divided(x) for name, x in batch.items()}, self.mesh)

    def part(self, values: PyTree, i: int) -> PyTree:
        return jax.tree.map(lambda x: x[0], values)
