import functools
import inspect
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm import config
from jaxlm.errors import ConfigError
from jaxlm.lookup import find
from jaxlm.optim import scheduled, schedules

STEPS = 200
COUNTS = np.arange(0, STEPS + 50)

COOLDOWN = {"parts": ("inverse_square_root", "linear"), "boundaries": (0.75,), "arguments": {"linear": {"final": 0.0}}}
THREE = {
    "parts": ("cosine", "hold", "again"),
    "boundaries": (0.4, 0.5),
    "arguments": {
        "cosine": {"final": 0.5},
        "hold": {"schedule": "constant"},
        "again": {"schedule": "warmup_stable_decay", "peak": 0.8, "tail": "sqrt", "warmup": 0.1, "cooldown": 0.5},
    },
}

# A name or two per schedule, with arguments beside warmup and final. Floats among them may be traced.
EXAMPLES = [
    ("constant", {}),
    ("linear", {}),
    ("cosine", {}),
    ("polynomial", {"power": 0.75}),
    ("polynomial", {"power": 3.0}),
    ("exponential", {}),
    ("inverse_square_root", {}),
    ("inverse_square_root", {"timescale": 0.25}),
    ("cosine_restarts", {"cycles": 4}),
    ("cosine_restarts", {"cycles": 3, "t_mult": 2.0}),
    ("warmup_stable_decay", {"cooldown": 0.2}),
    ("warmup_stable_decay", {"cooldown": 0.5, "tail": "sqrt"}),
    ("warmup_stable_decay", {"cooldown": 40.0, "tail": "cosine"}),
    ("one_cycle", {"initial": 0.1}),
    ("piecewise", {"boundaries": (0.5, 0.8), "multipliers": (0.5, 0.1)}),
    ("piecewise", {"boundaries": (0.5, 0.8), "multipliers": (0.2, 0.7), "interpolation": "linear"}),
    ("join", COOLDOWN),
    ("join", THREE),
]
IDS = [f"{name}-{i}" for i, (name, _) in enumerate(EXAMPLES)]
examples = pytest.mark.parametrize("index", range(len(EXAMPLES)), ids=IDS)


def shape(name, steps=STEPS, **arguments):
    return getattr(schedules, name)(steps, **arguments)


def values(shape, counts=COUNTS):
    return np.asarray(jax.jit(jax.vmap(shape))(jnp.asarray(counts)))


def test_every_schedule_has_an_example_here():
    public = {name for name, value in vars(schedules).items() if inspect.isfunction(value) and name[0] != "_"}
    assert public == {name for name, _ in EXAMPLES} | {"warmup_linear", "warmup_cosine"}
    assert schedules.warmup_linear is schedules.linear and schedules.warmup_cosine is schedules.cosine


def line(*lengths_and_levels):
    """Optax: from level to level in so many steps each, then constant."""
    (level, *levels), lengths = lengths_and_levels[::2], lengths_and_levels[1::2]
    parts, at = [], []
    for length, following in zip(lengths, levels, strict=True):
        parts.append(optax.linear_schedule(level, following, length))
        at.append((at or [0])[-1] + length)
        level = following
    return optax.join_schedules([*parts, optax.constant_schedule(level)], at)


def warmed(warmup, schedule):
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), schedule], [warmup])


def sgdr(warmup, final, lengths):
    cycles = [
        {"init_value": 1.0, "peak_value": 1.0, "warmup_steps": 0, "end_value": final, "decay_steps": n} for n in lengths
    ]
    return warmed(warmup, optax.sgdr_schedule(cycles))


OPTAX = {  # name, arguments beside warmup and final, optax's of warmup and final
    "constant": ("constant", {}, lambda w, f: line(0.0, w, 1.0)),
    "linear": ("linear", {}, lambda w, f: line(0.0, w, 1.0, STEPS - w, f)),
    "cosine": ("cosine", {}, lambda w, f: optax.warmup_cosine_decay_schedule(0.0, 1.0, w, STEPS, f)),
    "polynomial": ("polynomial", {"power": 3}, lambda w, f: warmed(w, optax.polynomial_schedule(1.0, f, 3, STEPS - w))),
    "exponential": (
        "exponential",
        {},
        lambda w, f: warmed(w, optax.exponential_decay(1.0, STEPS - w, f, end_value=f)),
    ),
    "restarts": ("cosine_restarts", {"cycles": 5}, lambda w, f: sgdr(w, f, [(STEPS - w) // 5] * 5)),
    "longer restarts": (
        "cosine_restarts",
        {"cycles": 4, "t_mult": 2.0},
        lambda w, f: sgdr(w, f, [(STEPS - w) // 15 * 2**i for i in range(4)]),
    ),
    "linear tail": (
        "warmup_stable_decay",
        {"cooldown": 0.25},
        lambda w, f: line(0.0, w, 1.0, STEPS - 50 - w, 1.0, 50, f),
    ),
    "cosine tail": (
        "warmup_stable_decay",
        {"cooldown": 50, "tail": "cosine"},
        lambda w, f: optax.join_schedules(
            [line(0.0, w, 1.0), optax.cosine_decay_schedule(1.0, 50, f)],
            [STEPS - 50],
        ),
    ),
    "steps": (
        "piecewise",
        {"boundaries": (0.5, 0.75), "multipliers": (0.5, 0.1)},
        lambda w, f: warmed(w, optax.piecewise_constant_schedule(1.0, {100 - w: 0.5, 150 - w: 0.2})),  # scales multiply
    ),
    "lines": (
        "piecewise",
        {"boundaries": (0.5, 160), "multipliers": (0.2, 0.7), "interpolation": "linear"},
        lambda w, f: line(0.0, w, 1.0, 100 - w, 0.2, 60, 0.7),
    ),
    "joined": (
        "join",
        {"parts": "cosine, constant,linear", "boundaries": (0.5, 150), "arguments": {"cosine": {"final": 0.5}}},
        lambda w, f: optax.join_schedules(
            [
                optax.warmup_cosine_decay_schedule(0.0, 1.0, w, 100, 0.5),
                optax.constant_schedule(0.5),
                optax.linear_schedule(0.5, f, 50),
            ],
            [100, 150],
        ),
    ),
}


@pytest.mark.parametrize(("warmup", "final"), [(20, 0.01), (35, 0.4)])
@pytest.mark.parametrize("case", OPTAX)
def test_a_shape_is_optaxs(case, warmup, final):
    name, others, optaxs = OPTAX[case]
    expected = values(optaxs(warmup, final))
    np.testing.assert_allclose(
        values(shape(name, warmup=warmup, final=final, **others)), expected, rtol=1e-5, atol=2e-6
    )


def test_one_cycle_is_optaxs():
    expected = values(optax.cosine_onecycle_schedule(STEPS, 1.0, 0.3, 25.0, 1e4))
    np.testing.assert_allclose(values(schedules.one_cycle(STEPS)), expected, rtol=1e-5, atol=1e-6)


def sawtooth(steps, w, final, lengths):
    """SGDR in NumPy: equation (5) of the paper, cycle by cycle."""
    cycles = [final + (1 - final) / 2 * (1 + np.cos(np.pi * np.arange(n) / n)) for n in lengths]
    return np.concatenate([np.arange(w) / w, *cycles])


def after(w, formula):
    t = np.arange(STEPS, dtype=float)
    return np.where(t < w, t / w, formula(t))


NUMPY = [  # name, arguments, values over the run
    ("inverse_square_root", {"warmup": 25}, after(25, lambda t: np.sqrt(25 / np.maximum(t, 25)))),
    (
        "inverse_square_root",
        {"warmup": 25, "final": 0.5},
        after(25, lambda t: np.maximum(np.sqrt(25 / np.maximum(t, 25)), 0.5)),
    ),
    (
        "inverse_square_root",
        {"warmup": 25, "timescale": 0.5},
        after(25, lambda t: np.sqrt(100 / (100 + np.maximum(t - 25, 0)))),
    ),
    ("inverse_square_root", {}, 1 / np.sqrt(1 + np.arange(STEPS))),
    ("exponential", {"warmup": 8, "final": 0.5**4}, after(8, lambda t: 0.5 ** ((t - 8) / 48))),
    ("warmup_stable_decay", {"cooldown": 0.2, "tail": "sqrt"}, 1 - np.sqrt(np.maximum(np.arange(STEPS) - 160, 0) / 40)),
    (
        "warmup_stable_decay",
        {"cooldown": 190, "warmup": 20, "final": 0.1},
        after(20, lambda t: 1 - 0.9 * (t - 20) / 180),
    ),
    (
        "piecewise",
        {"warmup": 60, "boundaries": (0.1, 0.75), "multipliers": (0.5, 0.1), "interpolation": "linear"},
        after(60, lambda t: 0.5 - 0.4 * np.clip((t - 60) / 90, 0, 1)),  # the first boundary lies within the warmup
    ),
    ("cosine_restarts", {"warmup": 60, "cycles": 3, "t_mult": 2, "final": 0.1}, sawtooth(STEPS, 60, 0.1, (20, 40, 80))),
]


@pytest.mark.parametrize(("name", "arguments", "expected"), NUMPY)
def test_a_shape_is_its_formula(name, arguments, expected):
    np.testing.assert_allclose(values(shape(name, **arguments), np.arange(STEPS)), expected, rtol=1e-5, atol=1e-6)


@functools.cache
def compiled(index, steps=None):
    """One program for all numbers of an example, (steps, warmup, final, other floats, counts) -> multipliers.

    Also those that no check would let through. `join` wants its steps and boundaries as constants.
    """
    name, others = EXAMPLES[index]
    leaves, tree = jax.tree.flatten(others)

    def run(traced_steps, warmup, final, floats, counts):
        floats = iter(floats)
        arguments = [next(floats) if i in traced_leaves(index) else leaf for i, leaf in enumerate(leaves)]
        built = shape(name, steps or traced_steps, warmup=warmup, final=final, **jax.tree.unflatten(tree, arguments))
        return jax.vmap(built)(counts)

    return jax.jit(run)


def traced_leaves(index):
    name, others = EXAMPLES[index]
    constants = others["boundaries"] if name == "join" else ()
    leaves = enumerate(jax.tree.leaves(others))
    return {i: leaf for i, leaf in leaves if type(leaf) is float and leaf not in constants}


@examples
def test_traced_numbers_in_lanes_give_what_python_numbers_give(index):
    name, others = EXAMPLES[index]
    given = [(0.0, 0.1), (0.125, 0.5), (30.0, 1.0)]
    floats = [jnp.float32(leaf) for leaf in traced_leaves(index).values()]
    lanes = jax.vmap(compiled(index, STEPS), (None, 0, 0, None, None))
    got = lanes(0, *jnp.array(given, jnp.float32).T, floats, jnp.asarray(COUNTS))
    for lane, (warmup, final) in zip(got, given, strict=True):
        solo = values(shape(name, warmup=warmup, final=final, **others))
        np.testing.assert_allclose(lane, solo, rtol=2e-6, atol=1e-6)


@examples
def test_it_rises_to_one_in_the_warmup_and_stays_after_the_run(index):
    name, others = EXAMPLES[index]
    for warmup in (0, 0.125, 50):
        multiplier = values(shape(name, warmup=warmup, final=0.1, **others))
        length = warmup * STEPS if warmup < 1 else warmup
        assert multiplier[int(length)] == 1
        if warmup and name != "one_cycle":
            np.testing.assert_allclose(multiplier[: int(length)], np.arange(length) / length, rtol=1e-6)
        np.testing.assert_array_equal(multiplier[STEPS:], multiplier[STEPS])
        if name not in ("constant", "inverse_square_root", "piecewise") and others is not COOLDOWN:
            np.testing.assert_allclose(multiplier[STEPS], 0.1, rtol=1e-6)


@examples
def test_a_warmup_of_less_than_a_step_is_none(index):
    name, others = EXAMPLES[index]
    got, without = (values(shape(name, warmup=warmup, final=0.1, **others)) for warmup in (0.9 / STEPS, 0.0))
    assert got[0] == 1
    np.testing.assert_array_equal(got, without)


@examples
def test_it_does_not_jump_nor_climb_again(index):
    name, others = EXAMPLES[index]
    change = np.diff(values(shape(name, 1000, warmup=50, final=0.1, **others), np.arange(1100)))
    climbs = name in ("cosine_restarts", "piecewise") or others is THREE
    steps_down = others is THREE or (name == "piecewise" and "interpolation" not in others)
    assert change[:50].min() > 0 and change[:50].max() < 0.035
    assert climbs or change[50:].max() < 1e-6
    assert steps_down or change[50:].min() > -0.05


@examples
def test_a_shape_is_float32_and_takes_int_counts(index):
    name, others = EXAMPLES[index]
    built = shape(name, warmup=0.1, final=0.1, **others)
    for count in (3, np.int64(3), jnp.int32(3)):
        out = jax.eval_shape(lambda count=count: built(count))
        assert out.dtype == jnp.float32 and out.shape == ()


number = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0, 1e6]) | st.floats(0, 1, width=32)
whole = st.integers(1, 3) | st.integers(1, 10**6)


@examples
@given(st.data(), whole, number | whole, number, st.lists(whole, min_size=1, max_size=8))
@settings(max_examples=100)
def test_a_shape_is_in_the_unit_interval(index, data, steps, warmup, final, counts):
    """Whatever the numbers: warmups as long as the run and longer, runs of one step, what the checks refuse."""
    floats = data.draw(st.tuples(*(number for _ in traced_leaves(index))))
    constant = data.draw(st.sampled_from([1, 10**6])) if EXAMPLES[index][0] == "join" else None
    counts = np.resize(counts + [0, steps - 1, steps], 11)  # of one length, so that nothing is compiled anew
    got = compiled(index, constant)(steps, *np.float32((warmup, final)), list(np.float32(floats)), counts)
    assert np.all((got >= 0) & (got <= 1)), got


@examples
@given(whole, st.floats(0, 1, exclude_max=True), st.floats(0, 1, width=32))
@settings(max_examples=50)
def test_warmup_as_a_fraction_is_so_many_steps(index, steps, share, final):
    constant = 10**6 if EXAMPLES[index][0] == "join" else None
    steps = constant or steps
    length = int(share * steps)
    counts = np.array([0, length // 2, max(length - 1, 0), length, length + 1, (length + steps) // 2, steps - 1, steps])
    floats = [np.float32(leaf) for leaf in traced_leaves(index).values()]
    fraction, in_steps = (
        compiled(index, constant)(steps, np.float32(warmup), np.float32(final), floats, counts)
        for warmup in (length / steps, length)
    )
    np.testing.assert_array_equal(fraction, in_steps)


@pytest.mark.parametrize(
    ("name", "others", "in_steps"),
    [
        ("inverse_square_root", {"timescale": 0.29}, {"timescale": 29}),
        ("warmup_stable_decay", {"cooldown": 0.29}, {"cooldown": 29}),
        ("piecewise", {"boundaries": (0.29, 0.57)}, {"boundaries": (29, 57)}),
        ("join", {"boundaries": 0.29}, {"boundaries": (29,)}),
    ],
)
def test_every_length_is_a_fraction_or_steps(name, others, in_steps):
    counts = np.arange(101)
    np.testing.assert_array_equal(
        values(shape(name, 100, warmup=10, **others), counts), values(shape(name, 100, warmup=10, **in_steps), counts)
    )


def test_a_long_warmup_of_a_long_run_does_not_overflow():
    shape = schedules.cosine(600_000, warmup=4000, final=0.1)  # their product is above 2**31
    np.testing.assert_allclose([float(shape(count)) for count in (2000, 4000)], [0.5, 1.0], rtol=1e-6)


def test_constant_does_not_decay():
    assert set(values(schedules.constant(STEPS, warmup=0.0, final=0.1))) == {1.0}


def test_a_joined_part_goes_on_where_the_one_before_ended_unless_it_has_a_peak():
    multiplier = values(shape("join", warmup=20, final=0.1, **THREE))
    assert multiplier[20] == 1 and multiplier[79] > 0.5
    np.testing.assert_allclose(multiplier[80:100], 0.5, rtol=1e-6)
    np.testing.assert_allclose(multiplier[100:110], 0.08 * np.arange(10), rtol=1e-5)  # its own warmup, of its 100 steps
    np.testing.assert_allclose(multiplier[110:150], 0.8, rtol=1e-6)
    np.testing.assert_allclose(multiplier[STEPS], 0.1, rtol=1e-5)


def test_joined_schedules_nest():
    inner = {"schedule": "join", "parts": "constant,linear", "boundaries": 0.5}
    nested = shape(
        "join", parts=("cosine", "rest"), boundaries=0.5, final=0.2, arguments={"cosine": {"final": 0.6}, "rest": inner}
    )
    flat = shape(
        "join", parts="cosine,constant,linear", boundaries=(0.5, 0.75), final=0.2, arguments={"cosine": {"final": 0.6}}
    )
    np.testing.assert_allclose(values(nested), values(flat), rtol=1e-5)


def test_the_users_schedule_of_the_docstring_works_alone_and_joined(tmp_path, monkeypatch):
    source = schedules.__doc__[schedules.__doc__.index("    def sawtooth") :]
    (tmp_path / "jaxlm_test_sawtooth.py").write_text("from jaxlm.optim import schedules\n" + textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    alone = values(find("schedule", "jaxlm_test_sawtooth:sawtooth", schedules)(STEPS, warmup=20, final=0.1, teeth=4.0))
    np.testing.assert_allclose(alone[[10, 20, 50, 99, 100]], [0.5 * 0.82, 0.64, 1.0, 0.118, 1.0], rtol=1e-5)
    joined = values(shape("join", warmup=20, parts=("jaxlm_test_sawtooth:sawtooth", "linear"), boundaries=(100,)))
    np.testing.assert_allclose(joined[[0, 10, 20, 25, 50, 99]], [0, 0.3, 0.2, 1.0, 1.0, 0.04], rtol=1e-5, atol=1e-6)


def test_join_is_written_in_a_config_or_by_flags():
    rate = "optimizer.scale_by_learning_rate."
    flags = {
        "schedule": "join",
        "parts": "inverse_square_root,linear",
        "boundaries": "0.75",
        "arguments.linear.final": "0.0",
    }
    by_flags = config.override(config.default(), {rate + key: value for key, value in flags.items()})
    c = config.default()
    c.optimizer.scale_by_learning_rate.update({"schedule": "join", **COOLDOWN})
    counts = jnp.asarray(COUNTS)
    for cfg in (by_flags, c):
        table = config.resolve(cfg).optimizer.scale_by_learning_rate.to_dict()
        got = jax.vmap(scheduled.number(steps=STEPS, **table))(counts)
        np.testing.assert_array_equal(got, 1e-3 * jax.vmap(shape("join", warmup=0.02, final=0.1, **COOLDOWN))(counts))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        *(
            (name, {"warmup": -0.1}, "warmup is -0.1; expected a fraction of the run below 1, or steps")
            for name, _ in EXAMPLES
        ),
        *((name, {"final": 1.5}, "final is 1.5; expected") for name, _ in EXAMPLES),
        ("cosine", {"warmup": "long"}, "warmup is 'long'; expected a fraction"),
        ("cosine", {"warmup": None}, "warmup is None"),
        ("cosine", {"warmup": jnp.float32(-0.5)}, "warmup is -0.5; expected"),
        ("cosine", {"final": float("nan")}, "final is nan; expected from 0 to 1"),
        ("exponential", {"final": 0.0}, "final is 0.0; expected above 0, which an exponential never reaches"),
        ("polynomial", {"power": 0.0}, "power is 0.0; expected a number above 0"),
        ("inverse_square_root", {"timescale": -1}, "timescale is -1; expected"),
        ("cosine_restarts", {"cycles": 0}, "cycles is 0; expected a whole number of at least 1"),
        ("cosine_restarts", {"cycles": 2.5}, "cycles is 2.5; expected a whole number"),
        ("cosine_restarts", {"t_mult": 0.5}, "t_mult is 0.5; expected at least 1"),
        (
            "warmup_stable_decay",
            {"cooldown": 1.5},
            "cooldown is 1.5; expected a fraction of the run below 1, or whole steps",
        ),
        ("warmup_stable_decay", {"cooldown": STEPS + 1}, "or whole steps of its 200"),
        ("warmup_stable_decay", {"cooldown": -0.1}, "cooldown is -0.1"),
        ("warmup_stable_decay", {"tail": "squrt"}, "tail has no 'squrt': did you mean 'sqrt'?"),
        ("one_cycle", {"initial": 25.0}, "initial is 25.0; expected from 0 to 1"),
        (
            "piecewise",
            {"boundaries": (0.75, 0.5)},
            r"boundaries are \(0.75, 0.5\); expected above 0, increasing",
        ),
        ("piecewise", {"boundaries": (0.75, 100)}, "expected above 0, increasing"),
        ("join", {"boundaries": 200}, "before the run's end, 200"),
        ("piecewise", {"boundaries": (0.0, 0.5)}, "expected above 0, increasing"),
        ("piecewise", {"boundaries": (0.5, 100.5)}, "boundaries is 100.5; expected fractions"),
        ("piecewise", {"boundaries": 0.5}, "1 boundaries and 2 multipliers"),
        ("piecewise", {"multipliers": (0.5, 2.0)}, "multipliers is 2.0; expected from 0 to 1"),
        ("piecewise", {"interpolation": "lines"}, "interpolation has no 'lines': did you mean 'linear'?"),
        ("join", {"parts": ("cosine", "linaer")}, "unknown schedule 'linaer': did you mean 'linear'?"),
        ("join", {"parts": ("cosine",)}, "1 schedules are joined by 0 boundaries, not"),
        ("join", {"boundaries": 0.2, "warmup": 0.3}, "warmup takes 60 steps, and its first part, 'constant', ends"),
        ("join", {"boundaries": (0.6, 0.5)}, "expected above 0, increasing"),
        ("join", {"arguments": 5}, "arguments are 5; expected a table by part, such as {'linear': {'final': 0.1}}"),
        ("join", {"arguments": {"linear": 5}}, "arguments are {'linear': 5}; expected a table by part"),
        ("join", {"arguments": {"liner": {"final": 0.1}}}, "arguments has no 'liner': did you mean 'linear'?"),
        (
            "join",
            {"arguments": {"linear": {"finale": 0.1}}},
            "'linear' takes no argument 'finale': did you mean 'final'?",
        ),
        ("join", {"arguments": {"linear": {"peak": 2.0}}}, "linear.peak is 2.0; expected from 0 to 1"),
        ("join", {"arguments": {"linear": {"final": -1}}}, "linear.final is -1; expected from 0 to 1"),
        ("join", {"parts": "constant,exponential"}, "final is 0.0; expected above 0"),
    ],
)
def test_a_bad_argument_says_what_was_expected(name, arguments, message):
    with pytest.raises(ConfigError, match=message):
        shape(name, **arguments)


@pytest.mark.parametrize("name", ["constant", "cosine", "join"])
@pytest.mark.parametrize("steps", [2**31, 3 * 10**9, -1])
def test_a_run_of_more_steps_than_can_be_counted_is_refused(name, steps):
    """Once an OverflowError, when the schedule was called."""
    with pytest.raises(ConfigError, match=f"steps is {steps}; expected at most "):
        getattr(schedules, name)(steps)
    assert float(getattr(schedules, name)(2**31 - 1)(2**30)) > 0
