"""A number over the steps of a run: a schedule's shape times a peak."""

from __future__ import annotations

from typing import Any

import optax

from jaxlm import lookup
from jaxlm.optim import schedules


def number(peak: schedules.Number, steps: int, schedule: str = "constant", **arguments: Any) -> optax.Schedule:
    """peak * shape(count), such as the learning rate.

    Args:
      schedule: a name in `jaxlm.optim.schedules`, or `package.module:function` with the same signature.
      arguments: of the schedule, such as `warmup` and `final`.

    Raises:
      ConfigError: there is no such schedule, or it takes no such number.
    """
    shape = lookup.find("schedule", schedule, schedules)(steps, **arguments)
    return lambda count: peak * shape(count)
