"""A number over the steps of a run: a schedule's shape times a peak."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from jaxlm.errors import ConfigError
from jaxlm.lookup import find
from jaxlm.optim import schedules


def find_schedule(name: Any) -> Callable[..., schedules.Shape]:
    """The schedule that a name means.

    Raises:
      ConfigError: there is none.
    """
    if not isinstance(name, str):
        raise ConfigError(f"schedule is {name!r}; expected the name of a schedule, your own as 'module:function'")
    return find("schedule", name, schedules)


def number(peak: schedules.Number, steps: int, schedule: str = "constant", **arguments: Any) -> optax.Schedule:
    """peak * shape(count), such as the learning rate.

    Args:
      schedule: a name in `jaxlm.optim.schedules`, or `package.module:function` with the same signature.
      arguments: of the schedule, such as `warmup` and `final`.

    Raises:
      ConfigError: there is no such schedule, or it takes no such number.
    """
    shape = find_schedule(schedule)(steps, **arguments)
    return lambda count: peak * shape(count)
