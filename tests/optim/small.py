"""Parameters named like a one-layer GPT-2's, gradients for them, and ten steps of a transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm import config
from jaxlm.optim import chain

STEPS = 40
DEFAULT = config.default().optimizer.to_dict()
KERNELS = {
    "h": {"attn": {"kernel": True, "bias": False}, "ln_1": {"scale": False, "bias": False}},
    "wte": {"embedding": False},
}

GROUPS = {
    "chain": ("partition",),
    "partition": {
        "matrices": {"where": "kernels", "chain": ("sgd",)},
        "table": {"where": "^wte", "chain": ()},
        "others": {"where": "rest", "chain": ("scale_by_lion", "rate")},
    },
    "sgd": {"learning_rate": 0.5},
    "rate": {"transform": "scale_by_learning_rate", "peak": 0.25},
}


def tensors(seed, scale=1.0):
    """A tree of arrays named like the parameters of a one-layer GPT-2."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)

    return {
        "h": {
            "attn": {"kernel": draw(1, 4, 6), "bias": draw(1, 6)},
            "ln_1": {"scale": draw(1, 4), "bias": draw(1, 4)},
        },
        "wte": {"embedding": draw(7, 4)},
    }


PARAMS = tensors(0)
GRADIENTS = [tensors(seed, scale=seed / 4) for seed in range(1, 11)]  # norms on both sides of the clip


def run(make, numbers):
    """Parameters after each of 10 steps of the transformation that `make` builds from traced numbers."""

    @jax.jit
    def step(numbers, params, state, gradients):
        updates, state = make(numbers).update(gradients, state, params, value=jnp.float32(0))
        return optax.apply_updates(params, updates), state

    params, state, out = PARAMS, jax.jit(lambda numbers: make(numbers).init(PARAMS))(numbers), []
    for gradients in GRADIENTS:
        params, state = step(numbers, params, state, gradients)
        out.append(params)
    return out


def split(spec):
    """The optimizer part of `config.split`: a spec with marks, and its numbers."""
    cfg = config.default()
    with cfg.unlocked(), cfg.ignore_type():
        cfg.optimizer = spec
    structure, hparams = config.split(config.resolve(cfg))
    return structure.optimizer.to_dict(), hparams.optimizer


def update(spec, gradients=None, steps=STEPS):
    """The first update of a spec that holds its numbers."""
    transform = chain.build(spec, None, steps)
    return transform.update(gradients or GRADIENTS[0], transform.init(PARAMS), PARAMS, value=jnp.float32(0))[0]


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, rtol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-7), a, b)
