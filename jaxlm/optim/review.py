"""What in a spec is almost surely a mistake, by rules. Shapes of parameters suffice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import optax.contrib

from jaxlm import tree
from jaxlm.errors import ConfigError
from jaxlm.optim import kinds, parts, transforms
from jaxlm.optim.edits import drop
from jaxlm.optim.stages import Spec, Stage, is_scheduled, stages, walk
from jaxlm.optim.ways import Way, ways

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


class Finding(NamedTuple):
    """A doubt about a spec, and the reason."""

    rule: str
    stage: str
    reason: str


NO_LEARNING_RATE = "no learning rate"
"""The rule of a finding that no training bears."""

IMPOSSIBLE = "an impossible argument"

_AVERAGING = re.compile("(adam_)?b[1-4]|beta|decay|momentum")
"""Arguments that are the share of the old in a moving average."""


def check(spec: Spec, params: PyTree = PARAMS, *, steps: int | None = None, strict: bool = False) -> list[Finding]:
    """What is almost surely wrong in a spec, with reasons; [] for one without doubts.

    Args:
      params: arrays or their shapes; by default a small GPT-2's.
      steps: the length of the run, where it is known.
      strict: raise instead.

    Raises:
      ConfigError: as `ways.explain`; and with `strict`, where anything is found.
    """
    passed = ways(stages(spec), params)
    doubts = [finding for rule in RULES for finding in rule(passed)]
    doubts += _endless_warmup(passed, steps) if steps else ()
    first: dict[tuple[str, str], Finding] = {}
    for finding in doubts:
        first.setdefault(finding[:2], finding)
    found = list(first.values())
    if strict and found:
        raise ConfigError("; ".join(f"optimizer stage {stage!r}: {reason}" for _, stage, reason in found))
    return found


def leave_one_out(spec: Spec) -> dict[str, dict[str, Any]]:
    """Variants of a study: {"without NAME": {"optimizer": the spec without it}} for each stage, of a group too. But not
    for those that set a learning rate, as one made in Python may, and without which no run would start, nor for the
    only one of a group."""
    every = list(walk(stages(spec)))
    alone = {group.stages[0].name for stage in every for group in stage.groups.values() if len(group.stages) == 1}
    free = [stage.name for stage in every if all(inner.rate is None for inner in walk((stage,)))]
    without = {name: drop(spec, name) for name in free if name not in alone}
    return {f"without {name}": {"optimizer": left} for name, left in without.items() if _trains(left)}


def _trains(spec: Spec) -> bool:
    try:
        return all(finding.rule != NO_LEARNING_RATE for finding in check(spec))
    except ConfigError:  # a mask of parameters that are not in every GPT-2
        return True


def _no_learning_rate(passed: list[Way]) -> Iterator[Finding]:
    for path, here, frozen in passed:
        if not here and not frozen:
            last = [way.stages[-1].name for way in passed if way.stages][-1]
            reason = f"no stage takes {path!r}, so its gradient is added as it is and training climbs: "
            yield Finding(NO_LEARNING_RATE, last, reason + "freeze it, or give it a group of a partition")
        elif here and not frozen and not any(kinds.descends(stage) or not kinds.known(stage) for stage in here):
            reason = f"nothing multiplies the updates of {path!r} by a negative learning rate, so training climbs: "
            yield Finding(NO_LEARNING_RATE, here[-1].name, reason + "end with scale_by_learning_rate")


def _whole_steps(passed: list[Way]) -> Iterator[Finding]:
    for stage in _once(passed):
        if stage.function is optax.adafactor and stage.rate is None:
            reason = "without a learning rate its steps are as large as the parameters: give it a peak"
            yield Finding("steps as large as the parameters", stage.name, reason)


def _two_learning_rates(passed: list[Way]) -> Iterator[Finding]:
    for path, here, _ in passed:
        names = [stage.name for stage in here if kinds.descends(stage)]
        if names and len(names) % 2 == 0 and all(map(kinds.known, here)):
            both = " and ".join(map(repr, names))
            reason = f"{both} each change the sign of the update of {path!r}, so training climbs: take one of them out"
            yield Finding("two changes of sign", names[1], reason)
        elif len(names) > 1:
            reason = f"its learning rate multiplies that of {names[0]!r}, for {path!r} and maybe others"
            yield Finding("two learning rates", names[1], reason)


def _wrong_sign(passed: list[Way]) -> Iterator[Finding]:
    for stage in _once(passed):
        rate = kinds.peak(stage)
        if rate and rate < 0:
            yield Finding("a number of the wrong sign", stage.name, f"with a learning rate of {rate} training climbs")
        if stage.function in kinds.CLIPPING:
            name = next(iter(stage.parameters))
            bound = kinds.argument(stage, name)
            if bound is not None and bound <= 0:
                reason = f"its {name} is {bound}, which leaves nothing of a gradient or turns it round: set it above 0"
                yield Finding("a number of the wrong sign", stage.name, reason)


def _impossible(passed: list[Way]) -> Iterator[Finding]:
    for stage in _once(passed):
        if kinds.peak(stage) == 0:
            yield Finding(
                IMPOSSIBLE, stage.name, "with a learning rate of 0 it trains nothing: set it above 0, or freeze"
            )
        for name in stage.arguments if kinds.known(stage) else ():
            if expected := _expected(stage, name):
                reason = f"its {name} is {stage.arguments[name]!r}; expected {expected}"
                yield Finding(IMPOSSIBLE, stage.name, reason)


def _expected(stage: Stage, name: str) -> str:
    """What an argument is to be instead, where it can't be meant; "" where it can, or nothing is known of it."""
    if name in ("peak", "learning_rate") and isinstance(stage.arguments[name], bool):
        return "a number"
    if name not in stage.parameters:
        return ""
    given, value, parameter = stage.arguments[name], kinds.argument(stage, name), stage.parameters[name]
    usual = parameter.default
    if isinstance(given, str) and isinstance(usual, bool):
        return "True or False"
    if isinstance(given, bool):
        required = usual is parameter.empty and "bool" not in str(parameter.annotation)
        return "a number" if required or type(usual) in (int, float) else ""
    if value is not None and _AVERAGING.fullmatch(name) and stage.function not in kinds.FACTORS and not 0 <= value < 1:
        return "at least 0 and below 1"
    if value is not None and re.match("eps|l1$|(adam_)?weight_decay$", name) and value < 0:
        return "zero or more"
    return ""


def _all_zero(passed: list[Way]) -> Iterator[Finding]:
    names = [[stage.name for stage in here if stage.function is optax.set_to_zero] for _, here, _ in passed]
    if all(names):
        yield Finding(
            "all set to zero", names[0][0], "it leaves nothing of any update, so nothing trains: set its where"
        )


def _endless_warmup(passed: list[Way], steps: int) -> Iterator[Finding]:
    for stage in _once(passed):
        for table in (stage.arguments, *filter(is_scheduled, stage.arguments.values())):
            warmup = table.get("warmup")
            if isinstance(warmup, (int, float)) and warmup > steps:
                reason = f"its warmup is {warmup:g} steps, and the run has {steps}: it ends below the peak"
                yield Finding("a warmup beyond the run", stage.name, reason)


def _late_scaling(passed: list[Way]) -> Iterator[Finding]:
    for _, here, _ in passed:
        rated = None
        for stage in here:
            if rated is not None and kinds.scales(stage):
                reason = f"it forgets the scale of what comes to it, and with it the learning rate of {rated!r}: "
                yield Finding("scaling after the learning rate", stage.name, reason + "put it before")
            if rated is not None and stage.function is transforms.cautious:
                reason = f"after the sign flip of {rated!r} all moves against the gradient, so all of it is masked: "
                yield Finding("cautious after the learning rate", stage.name, reason + "put it before")
            if kinds.descends(stage):
                rated = stage.name


def _late_clipping(passed: list[Way]) -> Iterator[Finding]:
    for _, here, _ in passed:
        scaled = None
        for stage in here:
            if stage.function in kinds.CLIPPING and stage.function not in kinds.OF_UPDATES and scaled is not None:
                reason = f"it clips what {scaled!r} has scaled already, not the gradient: put it first"
                yield Finding("clipping after scaling", stage.name, reason)
            if kinds.scales(stage):
                scaled = stage.name


def _clipping_of_frozen(passed: list[Way]) -> Iterator[Finding]:
    for path, here, frozen in passed:
        norms, by = here, frozen.name if frozen and frozen.function is parts.freeze else ""
        for i, stage in enumerate(here):
            lower = stage.function is parts.train_last_layers and tree.below_head(path, 1) == (1,)
            if lower or stage.function is optax.set_to_zero:
                norms, by = here[:i], stage.name
                break
        if by and (clipping := [stage.name for stage in norms if stage.function in kinds.GLOBAL_NORMS]):
            reason = f"its norm counts gradients of what {by!r} leaves as it is, such as {path!r}: put it after {by!r}"
            yield Finding("clipping of frozen gradients", clipping[0], reason)


def _decay_of_what(passed: list[Way]) -> Iterator[Finding]:
    for path, here, _ in passed:
        for stage in here:
            sound = tree.of_group(path, "kernels", "embeddings") or stage.arguments.get("mask")
            if sound or not kinds.decay(stage, path):
                continue
            reason = f"it decays biases or norms, such as {path!r}: set where='kernels'"
            if stage.where is None and "mask" in stage.parameters:
                reason += " on a stage add_decayed_weights of its own, and weight_decay=0 here"
            yield Finding("decay of biases or norms", stage.name, reason)


def _early_decay(passed: list[Way]) -> Iterator[Finding]:
    for _, here, _ in passed:
        for i, stage in enumerate(here):
            if stage.function is not optax.add_decayed_weights:
                continue
            scaled = any(kinds.scales(later) and later.function not in kinds.OF_UPDATES for later in here[i:])
            if scaled and not stage.name.startswith("l2"):
                reason = "decay before the gradient is scaled is L2 regularisation, not AdamW's decay: put it after "
                reason += "the scaling, or name the stage 'l2' if it is meant"
                yield Finding("decay before scaling", stage.name, reason)
            if any(map(kinds.descends, here[:i])):
                reason = "after the learning rate's sign flip, decay grows the weights: put it before"
                yield Finding("decay after the learning rate", stage.name, reason)


def _muon_of_what(passed: list[Way]) -> Iterator[Finding]:
    for path, here, _ in passed:
        for stage in here:
            if stage.function is optax.contrib.scale_by_muon and not tree.of_group(path, "kernels"):
                reason = f"orthogonalising {path!r} makes no sense: Muon is for kernels, see jaxlm's own muon"
                yield Finding("Muon on embeddings", stage.name, reason)
            if stage.function is optax.contrib.muon and "muon_weight_dimension_numbers" not in stage.arguments:
                reason = "optax's takes what has rank 2: embeddings and stacked biases, not the stacked kernels; "
                yield Finding("Muon on embeddings", stage.name, reason + "use 'muon'")
            if stage.function in (optax.contrib.galore, optax.contrib.scale_by_galore) and path.startswith("h/"):
                reason = "it projects what has rank 2: embeddings and stacked biases, not the stacked kernels, which "
                yield Finding("GaLore on stacked layers", stage.name, reason + "it leaves to Adam: give it embeddings")


def _decaying_schedule_free(passed: list[Way]) -> Iterator[Finding]:
    names = [stage.name for stage in _once(passed) if "schedule_free" in getattr(stage.function, "__name__", "")]
    for stage in _once(passed):
        rate = stage.rate
        if names and isinstance(rate, dict) and rate.get("schedule", "constant") != "constant":
            reason = f"{names[0]!r} takes the place of a decaying schedule: set schedule='constant', with a warmup"
            yield Finding("schedule-free with a schedule", stage.name, reason)


def _not_as_applied(passed: list[Way]) -> Iterator[Finding]:
    for _, here, _ in passed:
        for i, stage in enumerate(here):
            if stage.function not in kinds.AS_APPLIED:
                continue
            reason = "it must see the update as it is applied, which {!r} changes once more: put it "
            if around := [outer.name for outer in here[:i] if outer.function in kinds.REWRITING]:
                reason = reason.format(around[-1]) + "into a chain without that"
                yield Finding("not the applied update", stage.name, reason)
            elif after := [later.name for later in here[i + 1 :] if later.function is not transforms.ema_of_params]:
                yield Finding("not the applied update", stage.name, reason.format(after[0]) + "last")


RULES = (
    _no_learning_rate,
    _whole_steps,
    _two_learning_rates,
    _wrong_sign,
    _impossible,
    _all_zero,
    _late_scaling,
    _late_clipping,
    _clipping_of_frozen,
    _decay_of_what,
    _early_decay,
    _muon_of_what,
    _decaying_schedule_free,
    _not_as_applied,
)


def _once(passed: list[Way]) -> list[Stage]:
    """Each stage of some way."""
    return list({stage.name: stage for way in passed for stage in way.stages}.values())
