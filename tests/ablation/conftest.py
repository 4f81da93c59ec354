"""What several tests of studies stand on."""

import pytest

from jaxlm.ablation import lanes


@pytest.fixture
def timed(monkeypatch):
    """Seconds of a step that are made up: 0.25 for each sequence of the batch; the runs that were timed."""
    found = []

    def seconds_per_step(one):
        found.append(one.config)
        return 0.25 * one.config.data.batch_size

    monkeypatch.setattr(lanes, "median_seconds_per_step", seconds_per_step)
    return found
