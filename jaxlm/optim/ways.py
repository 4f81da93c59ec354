"""The way of each parameter through a spec: which stages touch it, and what they do to it. Shapes suffice."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm import tree
from jaxlm.optim import chain, kinds, parts
from jaxlm.optim.stages import Spec, Stage, stages, walk

PyTree = Any


class Way(NamedTuple):
    """What one parameter passes on its way through a chain."""

    path: str
    stages: tuple[Stage, ...]  # those that touch it, in the chain's order
    frozen: Stage | None  # what freezes it: `freeze`, or a partition with a group without stages


def ways(found: Sequence[Stage], params: PyTree) -> list[Way]:
    """The way of each parameter, through partitions too. Masks and groups see what their transforms will see.

    Raises:
      ConfigError: a mask that matches nothing there, a partition that does not cover it.
    """
    passed: dict[str, list[Stage]] = {path: [] for path in tree.paths(params)}
    frozen: dict[str, Stage] = {}

    def go(found: Sequence[Stage], params: PyTree) -> None:
        for stage in found:
            if stage.groups:
                names = chain.labels(stage.groups, params)
                for name, group in stage.groups.items():
                    part = _chosen(params, jax.tree.map(lambda label, name=name: label == name, names))
                    go(group.stages, part)
                    if not group.stages:
                        frozen.update(dict.fromkeys(tree.paths(part), stage))
                continue
            mask = tree.mask(params, stage.where or "all")
            if stage.function is parts.freeze:
                if all(jax.tree.leaves(mask)):
                    raise parts.nothing_left(str(stage.where))
                frozen.update(dict.fromkeys(tree.paths(_chosen(params, mask)), stage))
                params = _chosen(params, jax.tree.map(operator.not_, mask))  # what comes after it sees these only
                continue
            for path in tree.paths(_chosen(params, mask)):
                passed[path].append(stage)

    go(found, params)
    return [Way(path, tuple(here), frozen.get(path)) for path, here in passed.items()]


def _chosen(params: PyTree, mask: PyTree) -> PyTree:
    """As a transform behind a mask sees them."""
    return jax.tree.map(lambda leaf, on: leaf if on else optax.MaskedNode(), params, mask)


def trained(found: Sequence[Stage], values: PyTree) -> PyTree:
    """Parameters, or what is shaped like them, with zeros in the place of all that a chain leaves as it is: frozen
    ones, and layers below the last that `train_last_layers` trains."""
    by_path = {way.path: way for way in ways(found, values)}

    def part(key_path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        way = by_path[tree.path_of(key_path)]
        if way.frozen:
            return jnp.zeros_like(leaf)
        counts = [stage.arguments["count"] for stage in way.stages if stage.function is parts.train_last_layers]
        if counts and tree.of_layers(key_path):
            return leaf.at[: -min(counts)].set(0)
        return leaf

    return jax.tree_util.tree_map_with_path(part, values)


class Touched(NamedTuple):
    """What the optimizer does to one parameter."""

    stages: tuple[str, ...]  # those that touch it, in the chain's order
    decay: float  # weight decay, before it is multiplied by the learning rate
    multiplier: float  # its learning rate over the chain's first one, both at their peaks; that of its last layer
    first_layer: float  # the same of its first layer, where layers have rates of their own
    state_bytes: int  # of the optimizer's state, its own part


def explain(spec: Spec, params: PyTree, steps: int = 1_000_000) -> dict[str, Touched]:
    """{path: what touches it} for each parameter. Nothing is allocated.

    Args:
      spec: with its numbers in it, as in a config.
      params: arrays or their shapes.
      steps: the length of the run; by default one in which all lengths in a spec have room.

    Raises:
      ConfigError: see `stages.stages`; a mask that matches nothing, a partition that does not cover the parameters.
    """
    found, layers = ways(stages(spec), params), tree.num_layers(params)
    sizes = _state_bytes(spec, params, steps)
    first = next((rate for stage in walk(stages(spec)) if (rate := kinds.peak(stage))), None)

    def touched(way: Way) -> Touched:
        rate = next((own for stage in way.stages if (own := kinds.peak(stage, way.path))), None)
        multiplier = 0.0 if way.frozen else rate / first if rate and first else float(bool(way.stages))
        first_layer = last_layer = multiplier
        for stage in way.stages:
            factors = kinds.factors(stage, way.path, layers)
            first_layer, last_layer = first_layer * factors[0], last_layer * factors[-1]
        decayed = sum(kinds.decay(stage, way.path) for stage in way.stages)
        return Touched(tuple(stage.name for stage in way.stages), decayed, last_layer, first_layer, sizes[way.path])

    return {way.path: touched(way) for way in found}


def _state_bytes(spec: Spec, params: PyTree, steps: int) -> dict[str, int]:
    """Bytes of optimizer state by parameter: that of the leaves whose path in the state contains the parameter's."""
    out = dict.fromkeys(tree.paths(params), 0)
    by_length = sorted(out, key=len, reverse=True)  # "wte/embedding" before "embedding"
    params = jax.eval_shape(tree.float32, params)  # as a step gives them, whatever the model's dtype
    state = jax.eval_shape(chain.build(spec, None, steps).init, params)
    for path, leaf in zip(tree.paths(state), jax.tree.leaves(state), strict=True):
        owner = next((name for name in by_length if f"/{name}/" in f"/{path}/"), None)
        if owner is not None:
            out[owner] += leaf.size * np.dtype(leaf.dtype).itemsize
    return out
