"""Our own gradient transformations: functions `(arguments) -> optax.GradientTransformation`.

A name in a chain is looked up here first, then in optax. A parameter named `steps` is given the length of the run.
"""

from __future__ import annotations

from typing import Any

import optax

from jaxlm.optim import schedules
from jaxlm.optim.lookup import find


def learning_rate(peak: schedules.Number, steps: int, schedule: str = "constant", **arguments: Any) -> optax.Schedule:
    """peak * shape(count), the learning rate over the steps of a run.

    Args:
      schedule: a name in `jaxlm.optim.schedules`, or `package.module:function` with the same signature.
      arguments: of the schedule, such as `warmup` and `final`.
    """
    shape = find("schedule", schedule, schedules)(steps, **arguments)
    return lambda count: peak * shape(count)


def scale_by_learning_rate(
    peak: schedules.Number, steps: int, schedule: str = "constant", **arguments: Any
) -> optax.GradientTransformation:
    """u -> -learning_rate(count) u, where count starts at 0. See `learning_rate` for the arguments."""
    rate = learning_rate(peak, steps, schedule, **arguments)
    return optax.scale_by_schedule(lambda count: -rate(count))
