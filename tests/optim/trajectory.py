"""Five steps of a transform on parameters named like a two-layer GPT-2's; and of references, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

STEPS = 5


def draw(seed, leading=()):
    """Arrays named like the parameters of a two-layer GPT-2 of width 4, with the axes `leading` before their own."""
    rng = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(rng.normal(size=(*leading, *shape)), jnp.float32)

    return {
        "wte": {"embedding": array(10, 4)},
        "h": {
            "ln_1": {"bias": array(2, 4)},
            "attn": {"c_attn": {"kernel": array(2, 4, 12)}, "c_proj": {"kernel": array(2, 4, 4)}},
            "mlp": {"c_fc": {"kernel": array(2, 4, 6), "bias": array(2, 6)}, "c_proj": {"kernel": array(2, 6, 4)}},
        },
        "ln_f": {"scale": array(4)},
        "lm_head": {"kernel": array(4, 10)},
    }


PARAMS = draw(0)
GRADIENTS = draw(1, leading=(STEPS,))


def loss(params):
    """Not quadratic, so that its gradient turns."""
    return sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(params))


def trajectory(transform, gradients=GRADIENTS, params=PARAMS):
    """(updates, parameters after them), each with a leading axis of steps; and the last state."""
    transform = optax.with_extra_args_support(transform)

    def step(carry, grad):
        params, state = carry
        updates, state = transform.update(grad, state, params, value=loss(params), grad=grad, value_fn=loss)
        params = optax.apply_updates(params, updates)
        return (params, state), (updates, params)

    @jax.jit
    def run(gradients, params):
        (_, state), (updates, after) = jax.lax.scan(step, (params, transform.init(params)), gradients)
        return updates, after, state

    return run(gradients, params)


def checked(make, gradients=GRADIENTS, params=PARAMS, rtol=1e-4, atol=1e-5, **numbers):
    """The trajectory of make(**numbers), seen to be a lane's of the same with traced numbers under vmap."""
    alone = trajectory(make(**numbers), gradients, params)
    lanes = {name: jnp.float32([0.9 * value, value]) for name, value in numbers.items()}
    together = jax.jit(jax.vmap(lambda numbers: trajectory(make(**numbers), gradients, params)))(lanes)
    assert_close(jax.tree.map(lambda x: x[1], together[:2]), alone[:2], rtol, atol)
    return alone


def assert_close(a, b, rtol=1e-4, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def leaf(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return np.asarray(tree, np.float64)


def adam(gradients, b1, b2, eps):
    """Adam's directions for the gradients of one array."""
    m = v = 0.0
    out = []
    for t, g in enumerate(gradients, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        out.append(m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps))
    return np.array(out)
