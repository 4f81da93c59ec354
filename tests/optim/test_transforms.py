import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import ConfigError
from jaxlm.optim import schedules, transforms

UPDATES = {"w": jnp.array([1.0, -2.0]), "b": jnp.float32(3.0)}


def test_learning_rate_is_the_peak_times_the_shape():
    rate = transforms.learning_rate(3e-4, 100, "warmup_cosine", warmup=10, final=0.1)
    shape = schedules.warmup_cosine(100, warmup=10, final=0.1)
    for count in (0, 5, 10, 50, 100):
        np.testing.assert_allclose(rate(count), 3e-4 * shape(count), rtol=1e-6)
    np.testing.assert_allclose(rate(10), 3e-4, rtol=1e-6)


def test_learning_rate_is_constant_unless_told():
    assert [float(transforms.learning_rate(0.5, 100)(count)) for count in (0, 99)] == [0.5, 0.5]


def test_a_schedule_of_the_users_own_is_called_like_ours(tmp_path, monkeypatch):
    source = "def ramp(steps, *, slope):\n    return lambda count: slope * count / steps\n"
    (tmp_path / "jaxlm_test_ramp.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert transforms.learning_rate(2.0, 10, "jaxlm_test_ramp:ramp", slope=0.5)(4) == pytest.approx(0.4)


def test_an_unknown_schedule_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown schedule 'warmup_cosin': did you mean 'warmup_cosine'"):
        transforms.learning_rate(1.0, 10, "warmup_cosin")


def test_scale_by_learning_rate_counts_from_zero_and_descends():
    transform = transforms.scale_by_learning_rate(0.5, 10, "warmup_linear", warmup=2, final=0.0)
    state = transform.init(UPDATES)
    for rate in (0.0, 0.25, 0.5, 0.4375):  # warmup over 2 steps, then a line over 8
        out, state = transform.update(UPDATES, state)
        jax.tree.map(lambda got, u, rate=rate: np.testing.assert_allclose(got, -rate * u, rtol=1e-6), out, UPDATES)


def test_one_compilation_serves_any_learning_rate():
    traces = []

    @jax.jit
    def update(peak, warmup, final):
        traces.append(1)
        transform = transforms.scale_by_learning_rate(peak, 100, "warmup_cosine", warmup=warmup, final=final)
        return transform.update(UPDATES, transform.init(UPDATES)._replace(count=jnp.int32(50)))[0]["w"]

    peaks = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    outs = [update(jnp.float32(peak), jnp.float32(10), jnp.float32(0)) for peak in peaks]
    assert len(traces) == 1
    np.testing.assert_allclose([out[0] / outs[0][0] for out in outs], np.array(peaks) / peaks[0], rtol=1e-5)
