import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.optim import schedules

SHAPES = [schedules.constant, schedules.warmup_cosine, schedules.warmup_linear]
STEPS = 200
COUNTS = np.arange(0, STEPS + 50)


def values(shape, counts=COUNTS):
    return np.asarray(jax.vmap(shape)(jnp.asarray(counts)))


def linear(warmup, final):
    decay = optax.linear_schedule(1.0, final, STEPS - warmup)
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), decay], [warmup])


def constant(warmup, final):
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), optax.constant_schedule(1.0)], [warmup])


def cosine(warmup, final):
    return optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, STEPS, final)


@pytest.mark.parametrize(("warmup", "final"), [(0, 0.0), (1, 0.1), (20, 0.1), (37, 0.0), (150, 0.9)])
@pytest.mark.parametrize(
    ("ours", "optaxs"),
    [(schedules.warmup_cosine, cosine), (schedules.warmup_linear, linear), (schedules.constant, constant)],
)
def test_a_shape_is_optaxs(ours, optaxs, warmup, final):
    expected = values(optaxs(warmup, final))
    np.testing.assert_allclose(values(ours(STEPS, warmup=warmup, final=final)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_warmup_as_a_fraction_is_so_many_steps(shape):
    fraction = values(shape(STEPS, warmup=0.125, final=0.1))
    np.testing.assert_array_equal(fraction, values(shape(STEPS, warmup=25, final=0.1)))
    assert fraction[0] == 0 and fraction[24] < 1 and fraction[25] == 1


@pytest.mark.parametrize("shape", [schedules.warmup_cosine, schedules.warmup_linear])
def test_a_decay_ends_at_final_and_stays_there(shape):
    after = values(shape(STEPS, warmup=10, final=0.25))[STEPS:]
    np.testing.assert_allclose(after, 0.25, rtol=1e-6)


def test_constant_does_not_decay():
    assert set(values(schedules.constant(STEPS, warmup=0.0, final=0.1))) == {1.0}


@given(
    st.sampled_from(SHAPES),
    st.integers(1, 10**6),
    st.floats(0, 1, width=32, exclude_max=True) | st.integers(1, 2 * 10**6),
    st.floats(0, 1, width=32),
    st.lists(st.integers(0, 3 * 10**6), min_size=1, max_size=8),
)
@settings(max_examples=100, deadline=None)
def test_a_shape_is_in_the_unit_interval(shape, steps, warmup, final, counts):
    counts = np.resize(counts + [0, steps - 1, steps], 11)  # of one length, so that nothing is compiled anew
    multiplier = np.asarray(shape(steps, warmup=warmup, final=final)(jnp.asarray(counts)))
    assert np.all((multiplier >= 0) & (multiplier <= 1)), multiplier


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("warmup", [0.1, 30.0])
def test_traced_arguments_give_the_same_numbers(shape, warmup):
    def traced(warmup, final, counts):
        return shape(STEPS, warmup=warmup, final=final)(counts)

    given = jnp.float32(warmup), jnp.float32(0.1)
    np.testing.assert_allclose(jax.jit(traced)(*given, COUNTS), traced(warmup, 0.1, COUNTS), rtol=1e-5, atol=1e-6)


def test_a_shape_is_float32():
    for shape in SHAPES:
        assert shape(STEPS, warmup=0.1, final=0.1)(jnp.int32(3)).dtype == jnp.float32


def test_a_long_warmup_of_a_long_run_does_not_overflow():
    shape = schedules.warmup_cosine(600_000, warmup=4000, final=0.1)  # their product is above 2**31
    np.testing.assert_allclose([float(shape(count)) for count in (2000, 4000)], [0.5, 1.0], rtol=1e-6)
