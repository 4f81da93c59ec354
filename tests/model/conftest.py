import jax
import numpy as np
import pytest

from jaxlm import config
from jaxlm.model import gpt2

SMALL = {
    "num_layers": 2,
    "num_heads": 2,
    "embed_dim": 16,
    "context_length": 24,
    "vocab_size": 50,
}


@pytest.fixture(scope="session")
def build():
    """(**fields of the model section) -> a Model: two layers of width 16 unless told."""

    def make(**fields):
        changes = {f"model.{name}": value for name, value in {**SMALL, **fields}.items()}
        return gpt2.build(config.resolve(config.override(config.default(), changes)).model)

    return make


@pytest.fixture(scope="session")
def model(build):
    return build()


@pytest.fixture(scope="session")
def params(model):
    """As initialised, but with noise on biases and norms, and larger: so that every parameter matters."""
    params = jax.jit(model.init)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    return tree.unflatten([np.float32(5 * x + 0.1 * rng.normal(size=x.shape)) for x in leaves])
