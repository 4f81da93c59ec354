"""A run's part of the joules that a meter counts, and its metrics."""

from __future__ import annotations

import time
from collections.abc import Callable

from jaxlm.telemetry.energy import JOULES_PER_KWH, Meter

_AT_LEAST_EVERY = 60.0  # seconds; RAPL's counters of 65 kJ go round in two minutes at 500 W


class Share:
    """What a run is charged of a meter's joules: an equal part with the other runs that go on in the same calls.

    Args:
      meter: None charges nothing, and has no metrics.
      runs: how many go on now.
      joules: charged before, in earlier processes.
      carbon: grams of CO2 equivalent per kWh, if known.
    """

    def __init__(self, meter: Meter | None, runs: Callable[[], int], joules: float, carbon: float | None):
        self._meter, self._runs, self._carbon = meter, runs, carbon
        self._total, self._of_steps = joules, 0.0
        self._stepping = False
        self._read, self._at = meter.read() if meter else 0.0, time.perf_counter()

    def total(self) -> float:
        """Joules so far: of steps, compilation, evaluation and all else since the run began."""
        if self._meter:
            now = self._meter.read()
            part = (now - self._read) / max(1, self._runs())
            self._read, self._at = now, time.perf_counter()
            self._total += part
            self._of_steps += part * self._stepping
        return self._total

    def close(self) -> None:
        """What is used from now on is others'."""
        self.total()
        self._meter = None

    def stepping(self, on: bool) -> None:
        """What is used from now on is, or is not, that of steps."""
        if on != self._stepping:
            self.total()
            self._stepping = on

    def tick(self) -> None:
        """To be called often: counters go round."""
        if time.perf_counter() - self._at > _AT_LEAST_EVERY:
            self.total()

    def metrics(self, tokens: int) -> dict[str, float]:
        """For a row.

        Args:
          tokens: of the steps since the row before.
        """
        if not self._meter:
            return {}
        kwh = self.total() / JOULES_PER_KWH
        found = {"energy/joules_per_token": self._of_steps / tokens, "energy/kwh": kwh}
        self._of_steps = 0.0
        if self._carbon is not None:
            found["energy/gco2e"] = kwh * self._carbon
        if self._meter.idle is not None:
            found["energy/idle_watts"] = self._meter.idle
        return found | ({"energy/estimated": 1.0} if self._meter.estimated else {})
