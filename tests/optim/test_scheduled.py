"""A number over the steps of a run."""

import numpy as np
import pytest

from jaxlm.errors import ConfigError
from jaxlm.optim import scheduled, schedules


def test_it_is_the_peak_times_the_shape():
    number = scheduled.number(3e-4, 100, "warmup_cosine", warmup=10, final=0.1)
    shape = schedules.warmup_cosine(100, warmup=10, final=0.1)
    for count in (0, 5, 10, 50, 100):
        np.testing.assert_allclose(number(count), 3e-4 * shape(count), rtol=1e-6)
    np.testing.assert_allclose(number(10), 3e-4, rtol=1e-6)


def test_it_is_constant_unless_told():
    assert [float(scheduled.number(0.5, 100)(count)) for count in (0, 99)] == [0.5, 0.5]


def test_a_schedule_of_the_users_own_is_called_like_ours(tmp_path, monkeypatch):
    source = "def ramp(steps, *, slope):\n    return lambda count: slope * count / steps\n"
    (tmp_path / "jaxlm_test_ramp.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert scheduled.number(2.0, 10, "jaxlm_test_ramp:ramp", slope=0.5)(4) == pytest.approx(0.4)


def test_an_unknown_schedule_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown schedule 'warmup_cosin': did you mean 'warmup_cosine'"):
        scheduled.number(1.0, 10, "warmup_cosin")
