"""What a spec does to each parameter, and what in it is almost surely a mistake. Shapes of parameters suffice."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import optax.contrib

from jaxlm import tree
from jaxlm.errors import ConfigError
from jaxlm.optim import chain, transforms
from jaxlm.optim.muon import HIDDEN
from jaxlm.optim.stages import Spec, Stage, is_scheduled, stages

PyTree = Any


_LINEAR, _NORM, _TABLE = {"bias": 2, "kernel": 3}, {"bias": 2, "scale": 2}, {"embedding": 2}
_RANKS = {
    "h": {
        "attn": {"c_attn": _LINEAR, "c_proj": _LINEAR},
        "ln_1": _NORM,
        "ln_2": _NORM,
        "mlp": {"c_fc": _LINEAR, "c_proj": _LINEAR},
    },
    "ln_f": {"bias": 1, "scale": 1},
    "wpe": _TABLE,
    "wte": _TABLE,
}
PARAMS = jax.tree.map(lambda rank: jax.ShapeDtypeStruct((8,) * rank, np.float32), _RANKS)
"""Parameters with GPT-2's paths and ranks, for a look at a spec without a model."""


class Touched(NamedTuple):
    """What the optimizer does to one parameter."""

    stages: tuple[str, ...]  # those that touch it, in the chain's order
    decay: float  # weight decay, before it is multiplied by the learning rate
    multiplier: float  # its learning rate over the chain's first one, both at their peaks
    state_bytes: int  # of the optimizer's state, its own part


class Finding(NamedTuple):
    """A doubt about a spec, and the reason."""

    rule: str
    stage: str
    reason: str


# Explain


def explain(spec: Spec, params: PyTree, steps: int = 1) -> dict[str, Touched]:
    """{path: what touches it} for each parameter. Nothing is allocated.

    Args:
      spec: with its numbers in it, as in a config.
      params: arrays or their shapes.

    Raises:
      ConfigError: see `stages.stages`; a mask that matches nothing, a partition that does not cover the parameters.
    """
    paths = tree.paths(params)
    reached = list(reach(stages(spec), params))
    sizes = _state_bytes(spec, params, steps)
    first = next((_peak(stage) for stage, _ in reached if _peak(stage)), None)

    def touched(i: int, path: str) -> Touched:
        here = [stage for stage, on in reached if on[i]]
        rate = next((own for stage in here if (own := _peak(stage, path))), None)
        multiplier = rate / first if rate and first else float(bool(here))
        for stage in here:
            if stage.function is optax.scale:
                multiplier *= _argument(stage, "step_size") or 0.0
        decay = sum(_decay(stage, path) for stage in here)
        return Touched(tuple(stage.name for stage in here), decay, multiplier, sizes[path])

    return {path: touched(i, path) for i, path in enumerate(paths)}


def reach(
    found: Sequence[Stage], params: PyTree, on: Sequence[bool] | None = None
) -> Iterator[tuple[Stage, list[bool]]]:
    """(stage, for each leaf whether it gets there) in the chain's order, through partitions."""
    on = [True] * len(jax.tree.leaves(params)) if on is None else list(on)
    for stage in found:
        if stage.groups:
            names = jax.tree.leaves(chain.labels(stage.groups, params))
            for name, group in stage.groups.items():
                yield from reach(group.stages, params, [a and b == name for a, b in zip(on, names)])
            continue
        mask = jax.tree.leaves(tree.mask(params, stage.where or "all"))
        if stage.wraps and stage.function.__name__ == "freeze":
            on = [a and not b for a, b in zip(on, mask)]  # what comes after it sees these only
        else:
            yield stage, [a and b for a, b in zip(on, mask)]


def _argument(stage: Stage, name: str) -> Any:
    """An argument as given, at its peak where it follows a schedule, or its function's default; None without one."""
    value: Any = stage.arguments.get(name)
    if value is None and name in stage.parameters:
        value = stage.parameters[name].default
    if is_scheduled(value):
        value = value["peak"]
    return value if isinstance(value, (int, float)) else None


def _decay(stage: Stage, path: str) -> float:
    name = "weight_decay"
    if stage.function is transforms.mechanize:  # there it is of the step size that it learns
        return 0.0
    if _is_muons_adam(stage, path):
        if not path.endswith(("/kernel", "/embedding")):
            return 0.0
        name = "adam_weight_decay"
    return _argument(stage, name) or 0.0


def _is_muons_adam(stage: Stage, path: str) -> bool:
    return stage.function is transforms.muon and not re.search(HIDDEN, path)


def _peak(stage: Stage, path: str = "") -> float | None:
    """The peak of a stage's learning rate, for a parameter where they have not all the same."""
    rate = stage.rate
    if path and _is_muons_adam(stage, path):
        rate = _argument(stage, "adam_learning_rate") or rate
    return rate["peak"] if isinstance(rate, dict) else rate


def _state_bytes(spec: Spec, params: PyTree, steps: int) -> dict[str, int]:
    """Bytes of optimizer state by parameter: that of the leaves whose path in the state contains the parameter's."""
    out = dict.fromkeys(tree.paths(params), 0)
    by_length = sorted(out, key=len, reverse=True)  # "wte/embedding" before "embedding"
    state = jax.eval_shape(chain.build(spec, None, steps).init, params)
    for path, leaf in zip(tree.paths(state), jax.tree.leaves(state), strict=True):
        owner = next((name for name in by_length if f"/{name}/" in f"/{path}/"), None)
        if owner is not None:
            out[owner] += leaf.size * np.dtype(leaf.dtype).itemsize
    return out


# Check


NO_LEARNING_RATE = "no learning rate"
"""The rule of a finding that no training bears."""

CLIPPING = (
    *(transforms.clip_by_global_norm, optax.clip_by_global_norm),
    *(optax.clip, optax.clip_by_block_rms, optax.adaptive_grad_clip),
)
NOT_SCALING = (
    *CLIPPING,
    *(transforms.scale_by_learning_rate, optax.scale_by_learning_rate, optax.scale_by_schedule, optax.scale),
    *(optax.add_decayed_weights, optax.add_noise, optax.identity, optax.zero_nans, optax.centralize),
)


def check(spec: Spec, params: PyTree = PARAMS, *, strict: bool = False) -> list[Finding]:
    """What is almost surely wrong in a spec, with reasons; [] for one without doubts.

    Args:
      params: arrays or their shapes; by default a small GPT-2's.
      strict: raise instead.

    Raises:
      ConfigError: as `explain`; and with `strict`, where anything is found.
    """
    reached = list(reach(stages(spec), params))
    paths = tree.paths(params)
    found = list(dict.fromkeys(finding for rule in RULES for finding in rule(reached, paths)))
    if strict and found:
        raise ConfigError("; ".join(f"optimizer stage {stage!r}: {reason}" for _, stage, reason in found))
    return found


Reached = Sequence[tuple[Stage, list[bool]]]


def _no_learning_rate(reached: Reached, paths: list[str]) -> Iterator[Finding]:
    for i, path in enumerate(paths):
        here = [stage for stage, on in reached if on[i]]
        if here and not any(_has_rate(stage) or not _known(stage) for stage in here):
            reason = f"nothing multiplies the updates of {path!r} by a negative learning rate, so training climbs: "
            yield Finding(NO_LEARNING_RATE, here[-1].name, reason + "end with scale_by_learning_rate")
            return


def _two_learning_rates(reached: Reached, paths: list[str]) -> Iterator[Finding]:
    for i, path in enumerate(paths):
        here = [stage.name for stage, on in reached if on[i] and _has_rate(stage)]
        if len(here) > 1:
            reason = f"its learning rate multiplies that of {here[0]!r}, for {path!r} and maybe others"
            yield Finding("two learning rates", here[1], reason)
            return


def _late_clipping(reached: Reached, paths: list[str]) -> Iterator[Finding]:
    for here in _ways(reached, paths):
        scaled = None
        for stage in here:
            if stage.function in CLIPPING and scaled is not None:
                reason = f"it clips what {scaled!r} has scaled already, not the gradient: put it first"
                yield Finding("clipping after scaling", stage.name, reason)
            if _scales(stage):
                scaled = stage.name


def _decay_of_what(reached: Reached, paths: list[str]) -> Iterator[Finding]:
    for stage, on in reached:
        if not stage.arguments.get("mask"):
            hit = [path for path, hit in zip(paths, on) if hit and _decay(stage, path)]
            small = [path for path in hit if not path.endswith(("/kernel", "/embedding"))]
            if small:
                reason = f"it decays biases or norms, such as {small[0]!r}: set where='kernels'"
                if stage.where is None and "mask" in stage.parameters:
                    reason += " on a stage add_decayed_weights of its own, and weight_decay=0 here"
                yield Finding("decay of biases or norms", stage.name, reason)


def _early_decay(reached: Reached, paths: list[str]) -> Iterator[Finding]:
    for here in _ways(reached, paths):
        for i, stage in enumerate(here):
            if stage.function is not optax.add_decayed_weights:
                continue
            if any(map(_scales, here[i:])) and not stage.name.startswith("l2"):
                reason = "decay before the gradient is scaled is L2 regularisation, not AdamW's decay: put it after "
                reason += "the scaling, or name the stage 'l2' if it is meant"
                yield Finding("decay before scaling", stage.name, reason)
            if any(before.function in NOT_SCALING and _has_rate(before) for before in here[:i]):
                reason = "after the learning rate's sign flip, decay grows the weights: put it before"
                yield Finding("decay after the learning rate", stage.name, reason)


def _muon_of_what(reached: Reached, paths: list[str]) -> Iterator[Finding]:
    for stage, on in reached:
        if stage.function is optax.contrib.scale_by_muon:
            wrong = [path for path, hit in zip(paths, on) if hit and not path.endswith("/kernel")]
            if wrong:
                reason = f"orthogonalising {wrong[0]!r} makes no sense: Muon is for kernels, see jaxlm's own muon"
                yield Finding("Muon on embeddings", stage.name, reason)
        if stage.function is optax.contrib.muon and "muon_weight_dimension_numbers" not in stage.arguments:
            reason = "optax's takes what has rank 2: embeddings and stacked biases, not the stacked kernels; use 'muon'"
            yield Finding("Muon on embeddings", stage.name, reason)


def _decaying_schedule_free(reached: Reached, paths: list[str]) -> Iterator[Finding]:
    names = [stage.name for stage, _ in reached if "schedule_free" in getattr(stage.function, "__name__", "")]
    for stage, _ in reached:
        rate = stage.rate
        if names and isinstance(rate, dict) and rate.get("schedule", "constant") != "constant":
            reason = f"{names[0]!r} takes the place of a decaying schedule: set schedule='constant', with a warmup"
            yield Finding("schedule-free with a schedule", stage.name, reason)


RULES = (
    _no_learning_rate,
    _two_learning_rates,
    _late_clipping,
    _decay_of_what,
    _early_decay,
    _muon_of_what,
    _decaying_schedule_free,
)


def _ways(reached: Reached, paths: list[str]) -> list[list[Stage]]:
    """The stages that parameters pass, in order: each such list once."""
    ways = {}
    for i in range(len(paths)):
        here = [stage for stage, on in reached if on[i]]
        ways[tuple(stage.name for stage in here)] = here
    return list(ways.values())


def _known(stage: Stage) -> bool:
    """Whether its function is jaxlm's or optax's, so that its arguments say what it does."""
    module = getattr(inspect.unwrap(stage.function), "__module__", "") or ""
    return module.split(".")[0] in ("jaxlm", "optax")


def _has_rate(stage: Stage) -> bool:
    if stage.function is transforms.proximal_l1:
        return False  # its learning rate is that of the stage before it, and scales a threshold
    if stage.function is optax.scale:
        return (_argument(stage, "step_size") or 0) < 0
    names = {"learning_rate", "max_learning_rate"}
    rated = bool(names & set(stage.parameters)) and not stage.wraps
    bets = stage.function is optax.contrib.scale_by_cocob  # coin betting finds its step and its direction
    return stage.rate is not None or rated or bets or stage.function is optax.scale_by_schedule


def _scales(stage: Stage) -> bool:
    name = getattr(stage.function, "__name__", "")
    return stage.function not in NOT_SCALING and name.startswith("scale_by_")
