"""What several tests of studies stand on."""

import pytest

from jaxlm.ablation import lanes


@pytest.fixture
def timed(monkeypatch):
    """Seconds of a step that are made up: 0.25 for each sequence of the batch; the runs that were timed."""
    found = []

    def seconds_per_step(members, width):
        assert (len(members), width) == (1, 0)
        found.append(members[0].config)
        return 0.25 * members[0].config.data.batch_size

    monkeypatch.setattr(lanes, "seconds_per_step", seconds_per_step)
    return found
