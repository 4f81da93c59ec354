"""The step is a pure function, and hyperparameters are its argument. How it is compiled is `parallel`'s story."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import FrozenConfigDict

from jaxlm import config, functions, tree
from jaxlm.config import TRACED, Hparams
from jaxlm.errors import ConfigError
from jaxlm.evals import perplexity
from jaxlm.model import gpt2, losses
from jaxlm.optim import chain, ways
from jaxlm.optim.stages import stages
from jaxlm.optim.static import static_arguments
from jaxlm.optim.wrappers import evaluation_params, held_back

PyTree = Any
Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


class State(NamedTuple):
    """All that training changes: a pytree of arrays, with no functions inside."""

    step: jax.Array  # int32[]: completed optimizer steps
    params: PyTree
    opt_state: PyTree
    key: jax.Array  # the run's root key: constant, folded with the step where it is used


class Program(NamedTuple):
    """The pure functions of one structure.

    init(key, hparams, params=None) -> the state of these parameters, or of some drawn from the key
    train_step(hparams, state, batch) -> (the next state, metrics)
    eval_step(state, batch, of="") -> weighted sums, to be added over batches: of the parameters that the optimizer
        means as its result, or of another of `wrappers.evaluation_params`
    """

    init: Callable[..., State]
    train_step: Callable[[Hparams, State, Batch], tuple[State, Metrics]]
    eval_step: Callable[..., losses.TokenSums]
    model: gpt2.Model


def split(cfg: FrozenConfigDict) -> tuple[FrozenConfigDict, Hparams]:
    """`config.split` that keeps as constants the numbers which their transform can't take traced.

    Raises:
      ConfigError: the optimizer can't be built.
    """
    return config.split(cfg, _static(cfg, functions.digest(cfg, "optimizer.")))


@functools.lru_cache(maxsize=64)
def _static(cfg: FrozenConfigDict, code: str) -> frozenset[str]:
    params, spec = gpt2.shapes(cfg.model), cfg.optimizer.to_dict()
    ways.ways(stages(spec), params)  # the masks match, the partitions cover
    return static_arguments(spec, jax.eval_shape(tree.float32, params), cfg.steps)  # what the step gives the optimizer


def build(
    structure: FrozenConfigDict, placement: gpt2.Placement = gpt2.ON_ONE_DEVICE, axis: str | None = None
) -> Program:
    """The program of a structure from `split`.

    A batch holds `inputs`, `targets` int32[B, T], `weights` float32[B, T], and for packed documents `segment_ids`
    and `positions` int32[B, T]. B is a multiple of `structure.micro_batches`. The loss is the weighted mean over
    the whole batch, however it is split.

    Args:
      placement: as `gpt2.build` takes it.
      axis: the name of a mapped axis along which the batch is divided; None where it is whole. Dropout masks are then
        others than those of the whole batch.
    """
    model = gpt2.build(structure.model, placement)
    spec = structure.optimizer.to_dict()
    on = {name: value == TRACED for name, value in structure.loss.items()}
    dropout_on = structure.model.dropout == TRACED

    def over_axis(sums: PyTree) -> PyTree:
        return sums if axis is None else jax.lax.psum(sums, axis)

    def optimizer(hparams: Hparams) -> optax.GradientTransformationExtraArgs:
        return chain.build(spec, hparams.optimizer, structure.steps)

    def init(key: jax.Array, hparams: Hparams, params: PyTree | None = None) -> State:
        hparams = jax.tree.map(jnp.asarray, hparams)  # outside of jit optax takes NumPy's scalars for no numbers
        params_key, run_key = jax.random.split(key)
        params = model.init(params_key) if params is None else params
        opt_state = jax.tree.map(_strong, optimizer(hparams).init(tree.float32(params)))
        return State(jnp.int32(0), params, opt_state, run_key)

    def train_step(hparams: Hparams, state: State, batch: Batch) -> tuple[State, Metrics]:
        """One optimizer step. Pure: the same arguments give the same bits.

        Where the objective, the gradient or the update is not finite, parameters and optimizer state stay as they are:
        so too where no token counts, and there is no loss. Such a step is `optim/skipped`, and one of which
        `skip_nonfinite` held the update, or a part of it, back.
        """
        hparams = jax.tree.map(jnp.asarray, hparams)
        trained = functools.partial(ways.trained, stages(spec, hparams.optimizer))
        strength = {name: hparams.loss[name] if on[name] else None for name in on}
        weight = over_axis(jnp.sum(batch["weights"]))  # where it is 0, so is the loss: 0 / 0, not finite

        def objective(params: PyTree, part: Batch, key: jax.Array, chunks: int) -> tuple[jax.Array, losses.TokenSums]:
            dropout = {"dropout": hparams.dropout if dropout_on else None, "key": key}
            wanted = (part["targets"], part["weights"])
            terms: Any = {name: strength[name] for name in ("label_smoothing", "z_loss")}
            if chunks == 0:
                sums = losses.token_sums(model.apply(params, part, **dropout), *wanted, **terms)
            else:
                terms |= {"vocab_size": structure.model.vocab_size, "chunks": chunks}
                sums = losses.head_sums(model.hidden(params, part, **dropout), model.head(params), *wanted, **terms)
            return sums.objective, sums

        def penalty(params: PyTree) -> jax.Array:
            return losses.penalty(trained(params), l1=strength["l1"], l2=strength["l2"])

        def over_batch(fn: Callable[[Batch, jax.Array], PyTree]) -> PyTree:
            key = jax.random.fold_in(state.key, state.step)
            if axis is not None:
                key = jax.random.fold_in(key, jax.lax.axis_index(axis))
            return over_axis(_added(fn, structure.micro_batches, batch, key))

        def whole(params: PyTree) -> jax.Array:  # for transforms that evaluate it again, some of them in forward mode
            if axis is not None:  # differentiated again, its psum counts each device's gradient so many times
                raise ConfigError("a stage of the optimizer evaluates the loss again, which parallel.mode='jit' can do")
            loss = over_batch(lambda part, key: objective(params, part, key, 0)[0]) / weight
            return loss + penalty(params) if on["l1"] or on["l2"] else loss

        gradient = jax.grad(objective, has_aux=True)
        grads, sums = over_batch(lambda part, key: gradient(state.params, part, key, structure.model.loss_chunks))
        # A mean only here, since a token's share of it is too small a number for float16 on its way through the layers.
        # By a product, which XLA computes again for whoever wants it, where a quotient would be written out.
        mean = 1 / weight
        total, grads = sums.objective / weight, jax.tree.map(lambda g: g * mean, tree.float32(grads))
        if on["l1"] or on["l2"]:
            extra, extra_grads = jax.value_and_grad(penalty)(state.params)
            total, grads = total + extra, jax.tree.map(jnp.add, grads, extra_grads)

        params = tree.float32(state.params)  # the optimizer's dtype, whatever the model's
        updates, opt_state = chain.update(optimizer(hparams), grads, state.opt_state, params, whole, value=total)
        grads = trained(grads)  # of what is frozen no norm tells
        norms = {"optim/grad_norm": tree.norm(grads), "optim/update_norm": tree.norm(updates)}
        skip, held = ~jnp.isfinite(total + sum(norms.values())), held_back(state.opt_state, opt_state)
        kept, moved = (state.params, state.opt_state), (optax.apply_updates(state.params, updates), opt_state)
        params, opt_state = optax.tree.where(skip, kept, moved)
        metrics = {
            "train/loss": sums.nll / weight,
            "train/objective": total,
            "train/accuracy": sums.correct / weight,
            **norms,
            "optim/param_norm": tree.norm(params),
            "optim/skipped": (skip | held).astype(jnp.float32),
        }
        if structure.groups:
            metrics |= _by_group(params, grads, updates)
        count = chain.schedule_count(state.opt_state, state.step)
        rates = chain.learning_rates(spec, hparams.optimizer, structure.steps, count)
        for i, (stage, rate) in enumerate(rates.items()):
            metrics[f"optim/learning_rate/{stage}" if i else "optim/learning_rate"] = rate
        return State(state.step + 1, params, opt_state, state.key), metrics

    def eval_step(state: State, batch: Batch, of: str = "") -> losses.TokenSums:
        params = evaluation_params(state.opt_state, state.params)[of]
        sums = functools.partial(perplexity.token_sums, model, params, chunks=structure.model.loss_chunks)
        return over_axis(_added(sums, structure.micro_batches, batch))

    return Program(init, train_step, eval_step, model)


def shapes(cfg: FrozenConfigDict) -> State:
    """The state of a config's runs, in shapes; nothing is allocated.

    Raises:
      ConfigError: as `split`.
    """
    structure, hparams = split(cfg)
    found: State = jax.eval_shape(build(structure).init, jax.random.key(0), hparams)
    return found


def _strong(leaf: Any) -> jax.Array:
    """As an array whose dtype is not weak, as that of a Python number is: a step gives none such, and would be compiled
    twice."""
    leaf = jnp.asarray(leaf)
    return leaf if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended) else leaf.astype(leaf.dtype)


def _added(fn: Callable[..., PyTree], parts: int, batch: Batch, *key: jax.Array) -> PyTree:
    """The sum of `fn(batch, *key)` over a batch cut in so many parts, each with a key of its own, computed one after
    another and added in float32. Where the sum is differentiated, each part is computed again for that: with the
    activations of all of them kept, parts would save nothing."""
    if parts == 1:
        return fn(batch, *key)
    fn = jax.checkpoint(fn, prevent_cse=False)  # in a scan there is nothing to prevent

    def cut(x: jax.Array) -> jax.Array:
        # part m takes rows m, m + parts, ...: rows that are sharded over devices stay on theirs
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    def add(total: PyTree, part: tuple[Any, ...]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, fn(*part)), None

    cuts = (jax.tree.map(cut, dict(batch)), *(jax.random.split(one, parts) for one in key))
    shapes = jax.eval_shape(fn, *jax.tree.map(lambda x: x[0], cuts))
    return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes), cuts)[0]


def _by_group(params: PyTree, grads: PyTree, updates: PyTree) -> dict[str, jax.Array]:
    """Norms of parameters, gradients and updates, and the share of parameters that are exactly zero, by group of
    `tree.GROUPS`: {"optim/param_norm/kernels": float32[], ...}."""
    out = {}
    for group in (name for name in tree.GROUPS if name != "all"):
        on = jax.tree.leaves(tree.mask(params, group))

        def chosen(values: PyTree, on: list[bool] = on) -> list[jax.Array]:
            return [leaf for leaf, chosen in zip(jax.tree.leaves(values), on, strict=True) if chosen]

        for name, values in (("param_norm", params), ("grad_norm", grads), ("update_norm", updates)):
            out[f"optim/{name}/{group}"] = tree.norm(chosen(values))
        zeros = sum(jnp.sum(leaf == 0) for leaf in chosen(params))
        out[f"optim/sparsity/{group}"] = zeros / jnp.float32(tree.size(chosen(params)))
    return out
