"""What is known of stages by their functions: which turn a gradient into a step, which forget its scale, which clip,
and by how much they decay or multiply. A new transform that does any of it gets its line here."""

from __future__ import annotations

import re
from typing import Any

import optax
import optax.contrib

from jaxlm import tree
from jaxlm.optim import transforms
from jaxlm.optim.muon import HIDDEN
from jaxlm.optim.stages import MODULES, Stage, is_scheduled

GLOBAL_NORMS = (transforms.clip_by_global_norm, optax.clip_by_global_norm)
CLIPPING = (*GLOBAL_NORMS, optax.clip, optax.clip_by_block_rms, optax.adaptive_grad_clip)
OF_UPDATES = (optax.clip_by_block_rms, optax.scale_by_trust_ratio)
"""What is meant for scaled and decayed updates: Adafactor's clipping, LAMB's ratio."""
RATES = (
    *(transforms.scale_by_learning_rate, optax.scale_by_learning_rate, optax.scale_by_schedule),
    optax.contrib.scale_by_cocob,  # coin betting finds its step and its direction
    optax.contrib.scale_by_madgrad,
)
"""Those of the scale_by_... that are a learning rate and change the sign."""
FACTORS = (
    *(transforms.scale_by_layer, optax.scale_by_param_block_norm, optax.scale_by_param_block_rms),
    *(optax.scale_by_polyak, optax.scale_by_backtracking_linesearch, optax.scale_by_zoom_linesearch),
)
"""Those that multiply what comes to them, and don't forget its scale."""
DIVIDES_BY_RATES = (optax.contrib.prodigy, optax.contrib.dadapt_adamw)
"""Divide by a sum of their rates: with a first rate of 0, as a warmup has it, that is 0 / 0, and they never move."""
OF_ONE_RATE = (optax.sm3, optax.rprop)
"""Take a learning rate that is a number, and none that follows a schedule."""
AS_APPLIED = (transforms.ema_of_params, transforms.proximal_l1)
"""What looks at the new parameters."""
REWRITING = (transforms.lookahead, transforms.schedule_free, transforms.mechanize)
"""Wrappers after which the new parameters aren't the old ones plus inner's update."""


def known(stage: Stage) -> bool:
    """Whether its function is what its name finds in jaxlm or optax, so that its arguments say what it does: one of
    the user's own, or a made transform, may hold a learning rate."""
    name = getattr(stage.function, "__name__", "")
    return any(getattr(module, name, None) is stage.function for module in MODULES)


def descends(stage: Stage) -> bool:
    """Whether it turns a gradient into a step down, by a learning rate and a change of sign."""
    if stage.function is optax.scale:
        return (argument(stage, "step_size") or 0) < 0
    if _is_scale_by(stage):
        return stage.function in RATES
    if stage.function is transforms.proximal_l1 or stage.wraps:  # the learning rate there is that of another stage
        return False
    return bool({"learning_rate", "max_learning_rate"} & set(stage.parameters))


def scales(stage: Stage) -> bool:
    """Whether it forgets the scale of the gradient."""
    return _is_scale_by(stage) and stage.function not in (*RATES, *FACTORS)


def _is_scale_by(stage: Stage) -> bool:
    return getattr(stage.function, "__name__", "").startswith("scale_by_")


def argument(stage: Stage, name: str) -> Any:
    """An argument as given, at its peak where it follows a schedule, or its function's default; None without one."""
    value: Any = stage.arguments.get(name)
    if value is None and name in stage.parameters:
        value = stage.parameters[name].default
    if is_scheduled(value):
        value = value["peak"]
    return value if isinstance(value, (int, float)) else None


def decay(stage: Stage, path: str) -> float:
    """A stage's weight decay of a parameter, before it is multiplied by the learning rate; adafactor's is not."""
    name = "weight_decay_rate" if stage.function is optax.adafactor else "weight_decay"
    if stage.function is transforms.mechanize:  # there it is of the step size that it learns
        return 0.0
    if _is_muons_adam(stage, path):
        if not tree.of_group(path, "kernels", "embeddings"):
            return 0.0
        name = "adam_weight_decay"
    return argument(stage, name) or 0.0


def _is_muons_adam(stage: Stage, path: str) -> bool:
    return stage.function is transforms.muon and not re.search(HIDDEN, path)


def peak(stage: Stage, path: str = "") -> float | None:
    """The peak of a stage's learning rate, for a parameter where they have not all the same."""
    rate = stage.rate
    if path and _is_muons_adam(stage, path):
        rate = argument(stage, "adam_learning_rate") or rate
    rate = rate["peak"] if isinstance(rate, dict) else rate
    return rate if isinstance(rate, (int, float)) else None  # no number: a schedule of Python's


def factors(stage: Stage, path: str, layers: int) -> list[float]:
    """What a stage multiplies the learning rate by, in each layer or in all that there is."""
    below = tree.below_head(path, layers)
    if stage.function is optax.set_to_zero:
        return [0.0]
    if stage.function is optax.scale:
        return [argument(stage, "step_size") or 0.0]
    if stage.function is transforms.scale_by_layer:
        return [(argument(stage, "decay") or 0.0) ** power for power in below]
    if stage.function is transforms.train_last_layers and len(below) > 1:
        return [float(power <= stage.arguments["count"]) for power in below]
    return [1.0]
