import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.errors import ConfigError
from jaxlm.optim import transforms
from tests.optim import trajectory as five
from tests.optim.trajectory import adam, assert_close, leaf

LIMIT = 5  # of the sides: c_proj keeps both, c_fc the left one, wte the right one
SIDES = {"h/attn/c_proj/kernel": ("left", "right"), "h/mlp/c_fc/kernel": ("left",), "wte/embedding": ("right",)}
NUMBERS = {"b1": 0.9, "b2": 0.8, "eps": 1e-3}
SOAP = functools.partial(transforms.scale_by_soap, precondition_frequency=2, max_precond_dim=LIMIT)
SHAMPOO = functools.partial(transforms.scale_by_shampoo, precondition_frequency=2, max_precond_dim=LIMIT)


def some(tree):
    """Enough for each kind of leaf: a decomposition is slow to compile."""
    return {
        "wte": tree["wte"],
        "h": {"attn": {"c_proj": tree["h"]["attn"]["c_proj"]}, "mlp": {"c_fc": tree["h"]["mlp"]["c_fc"]}},
        "ln_f": tree["ln_f"],
    }


PARAMS, GRADIENTS = some(five.PARAMS), some(five.GRADIENTS)
checked = functools.partial(five.checked, gradients=GRADIENTS, params=PARAMS, rtol=1e-3, atol=1e-4)


@functools.cache
def compiled(make, eps=NUMBERS["eps"]):
    """gradients -> (updates, parameters, last state)"""
    return jax.jit(lambda gradients: five.trajectory(make(**NUMBERS | {"eps": eps}), gradients, PARAMS))


def outer(side, g):
    return g @ g.T if side == "left" else g.T @ g


def times(x, matrices, transpose=False):
    """left x rightᵀ; with `transpose` leftᵀ x right."""
    if "left" in matrices:
        x = (matrices["left"].T if transpose else matrices["left"]) @ x
    if "right" in matrices:
        x = x @ (matrices["right"] if transpose else matrices["right"].T)
    return x


def soap(gradients, sides, b1, b2, eps, frequency):
    """The updates of one matrix, as the authors' code computes them."""
    factors = {side: (1 - b2) * outer(side, gradients[0]) for side in sides}
    bases = {side: np.linalg.eigh(factors[side])[1][:, ::-1] for side in sides}
    m = v = np.zeros_like(gradients[0])
    out = [np.zeros_like(m)]
    for t, g in enumerate(gradients[1:], 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * times(g, bases, transpose=True) ** 2
        turned = times(m, bases, transpose=True) / (1 - b1**t)
        out.append(times(turned / (np.sqrt(v / (1 - b2**t)) + eps), bases))
        for side in sides:
            factors[side] = b2 * factors[side] + (1 - b2) * outer(side, g)
            if t % frequency == 0:
                product = factors[side] @ bases[side]
                order = np.argsort(-np.einsum("ij,ij->j", bases[side], product))
                bases[side] = np.linalg.qr(product[:, order])[0]
                v = v[order] if side == "left" else v[:, order]
    return np.array(out)


def shampoo(gradients, sides, b1, b2, eps, matrix_eps, frequency):
    """The updates of one matrix."""
    grafts = adam(gradients, b1, b2, eps)
    factors, roots, m, out = dict.fromkeys(sides, 0.0), {}, 0.0, []
    for t, g in enumerate(gradients, 1):
        m = b1 * m + (1 - b1) * g
        for side in sides:
            factors[side] = b2 * factors[side] + (1 - b2) * outer(side, g)
            if (t - 1) % frequency == 0:
                values, vectors = np.linalg.eigh(factors[side] / (1 - b2**t))
                roots[side] = vectors @ np.diag((values + matrix_eps * values.max()) ** (-0.5 / len(sides))) @ vectors.T
        direction = times(m, roots)
        out.append(direction * np.linalg.norm(grafts[t - 1]) / np.linalg.norm(direction))
    return np.array(out)


def by_layer(reference, gradients):
    """The reference of [steps, L, m, n], layer by layer."""
    if gradients.ndim == 3:
        return reference(gradients)
    return np.stack([reference(gradients[:, layer]) for layer in range(gradients.shape[1])], axis=1)


def test_soap_is_its_formula_on_each_layer():
    updates, _, state = checked(SOAP, **NUMBERS)
    for path, sides in SIDES.items():
        expected = by_layer(lambda g, sides=sides: soap(g, sides, **NUMBERS, frequency=2), leaf(GRADIENTS, path))
        np.testing.assert_allclose(leaf(updates, path), expected, rtol=1e-3, atol=1e-4, err_msg=path)
    assert jax.tree.map(jnp.shape, state.bases) == {
        "wte": {"embedding": {"right": (4, 4)}},
        "h": {
            "attn": {"c_proj": {"kernel": {"left": (2, 4, 4), "right": (2, 4, 4)}}},
            "mlp": {"c_fc": {"kernel": {"left": (2, 4, 4)}, "bias": {}}},
        },
        "ln_f": {"scale": {}},
    }


def test_shampoo_is_its_formula_on_each_layer():
    numbers = NUMBERS | {"matrix_eps": 1e-2}
    updates, _, _ = checked(SHAMPOO, **numbers)
    for path, sides in SIDES.items():
        expected = by_layer(lambda g, sides=sides: shampoo(g, sides, **numbers, frequency=2), leaf(GRADIENTS, path))
        np.testing.assert_allclose(leaf(updates, path), expected, rtol=1e-3, atol=1e-4, err_msg=path)


@pytest.mark.parametrize(("make", "late"), [(SOAP, 1), (SHAMPOO, 0)], ids=["soap", "shampoo"])
def test_norms_and_biases_are_adams(make, late):
    updates, _, _ = compiled(make)(GRADIENTS)
    for path in ("h/mlp/c_fc/bias", "ln_f/scale"):
        expected = adam(leaf(GRADIENTS, path)[late:], **NUMBERS)
        np.testing.assert_allclose(leaf(updates, path)[late:], expected, rtol=1e-4, atol=1e-6)
        assert not leaf(updates, path)[:late].any()


def test_soap_without_sides_is_optaxs_adam_one_step_late():
    updates, _, state = compiled(functools.partial(transforms.scale_by_soap, max_precond_dim=0), eps=0.0)(GRADIENTS)
    expected, _, _ = compiled(optax.scale_by_adam, eps=0.0)(jax.tree.map(lambda g: g[1:], GRADIENTS))
    assert_close(jax.tree.map(lambda u: u[1:], updates), expected)
    assert not any(u[0].any() for u in jax.tree.leaves(updates))
    assert not jax.tree.leaves((state.factors, state.bases))


@pytest.mark.parametrize("make", [SOAP, SHAMPOO], ids=["soap", "shampoo"])
def test_gradients_of_zero_and_of_one_row_give_finite_updates(make):
    zero = jax.tree.map(jnp.zeros_like, GRADIENTS)
    row = jax.tree.map(lambda g: g.at[..., 1:, :].set(0), GRADIENTS)
    assert not any(u.any() for u in jax.tree.leaves(compiled(make)(zero)[0]))
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(compiled(make)(row)[0]))


@pytest.mark.parametrize("make", [SOAP, SHAMPOO], ids=["soap", "shampoo"])
def test_bfloat16_gradients_get_bfloat16_updates_from_float32_states(make):
    updates = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.bfloat16), PARAMS)
    state = make().init(updates)
    out, after = jax.eval_shape(make().update, updates, state)
    assert {u.dtype for u in jax.tree.leaves(out)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves((state[1:], after[1:]))} == {jnp.dtype(jnp.float32)}


def operations(jaxpr, inside=False):
    """(name, rank of what it is given, whether inside of a cond) of every operation."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        yield name, equation.invars and equation.invars[0].aval.ndim, inside
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from operations(inner, inside or name == "cond")


@pytest.mark.parametrize(("make", "names"), [(SOAP, {"eigh", "qr"}), (SHAMPOO, {"eigh"})], ids=["soap", "shampoo"])
def test_also_in_lanes_matrices_are_decomposed_only_when_due_and_never_in_batches(make, names):
    """In batches they can hang on the CPU, see `_one_by_one`: with larger matrices, and not always."""

    def update(b1, state):
        return make(b1=b1).update(PARAMS, state)

    b1 = jnp.ones((3, 2))
    states = jax.eval_shape(jax.vmap(jax.vmap(lambda _: make().init(PARAMS))), b1)
    lanes = jax.make_jaxpr(jax.vmap(jax.vmap(update)))(b1, states)
    found = {operation for operation in operations(lanes.jaxpr) if operation[0] in names}
    assert found == {(name, 2, True) for name in names}


def test_lanes_at_different_steps_keep_their_own_time():
    """As behind `skip_nonfinite`, which holds one lane back."""
    transform = SOAP()

    def update(step):
        state = transform.init(PARAMS)
        bases = jax.tree.map(lambda x: x + jnp.eye(4), state.bases)
        gradients = jax.tree.map(lambda g: g[0], GRADIENTS)
        return transform.update(gradients, state._replace(step=step, bases=bases))

    steps, alone = jnp.arange(4), jax.jit(update)
    together = jax.jit(jax.vmap(update))(steps)
    for i in steps:
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), alone(i))


@pytest.mark.parametrize("make", [SOAP, SHAMPOO], ids=["soap", "shampoo"])
def test_a_frequency_below_one_is_refused(make):
    with pytest.raises(ConfigError, match="precondition_frequency=0, but it counts steps"):
        make(precondition_frequency=0)
