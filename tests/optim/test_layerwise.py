"""What looks at a matrix as a whole sees those of each layer, as if no layer were stacked."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.optim import chain, layerwise
from tests.optim.trajectory import GRADIENTS, PARAMS, checked, trajectory

ARGUMENTS = {
    "adafactor": {"learning_rate": 0.1, "min_dim_size_to_factor": 4},
    "adaptive_grad_clip": {"clipping": 0.1},
    "clip_by_block_rms": {"threshold": 0.1},
    "scale_by_factored_rms": {"min_dim_size_to_factor": 4},
    **{name: {"learning_rate": 0.1} for name in ("fromage", "lamb", "lars", "novograd", "sm3")},
}


def apart(tree, axis):
    """Each layer under a name of its own."""
    layers = {f"h{i}": jax.tree.map(lambda x, i=i: x.take(i, axis), tree["h"]) for i in range(2)}
    return {name: part for name, part in tree.items() if name != "h"} | layers


@pytest.mark.parametrize("function", layerwise.OF_A_MATRIX, ids=lambda function: function.__name__)
def test_a_stack_of_layers_is_trained_as_the_layers_one_by_one(function):
    arguments = ARGUMENTS.get(function.__name__, {})
    updates, _, state = trajectory(layerwise.layer_by_layer(function(**arguments)))
    expected, _, single = trajectory(function(**arguments), apart(GRADIENTS, 1), apart(PARAMS, 0))
    for name, part in apart(updates, 1).items():
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), part, expected[name])
    assert sum(x.size for x in jax.tree.leaves(state)) == sum(x.size for x in jax.tree.leaves(single))


def ten_times_the_first():
    kernel = jax.random.normal(jax.random.key(0), (1, 8, 24))
    return {"h": {"attn": {"c_attn": {"kernel": jnp.concatenate([kernel, 10 * kernel])}}}}


def norms(updates):
    return jnp.linalg.norm(updates["h"]["attn"]["c_attn"]["kernel"].reshape(2, -1), axis=-1)


@pytest.mark.parametrize("rest", [{}, {"wte": {"embedding": jnp.ones((4, 8))}}], ids=["layers only", "and a table"])
@pytest.mark.parametrize("where", [{}, {"where": "kernels"}], ids=["all", "kernels"])
def test_a_stage_of_a_chain_sees_each_layer(rest, where):
    params = ten_times_the_first() | rest
    gradients = jax.tree.map(jnp.ones_like, params)
    transform = chain.build({"chain": ("scale_by_trust_ratio",), "scale_by_trust_ratio": where}, None, 10)
    updates, _ = transform.update(gradients, transform.init(params), params)
    np.testing.assert_allclose(norms(updates), norms(params), rtol=1e-5)


def test_counts_are_there_once_and_a_number_may_follow_a_schedule():
    rate = {"peak": 0.1, "schedule": "linear", "final": 0.0}
    spec = {"chain": ("lamb",), "lamb": {**rate, "weight_decay": dict(rate)}}
    _, _, state = trajectory(chain.build(spec, None, 10))
    assert chain.schedule_count(state, jnp.int32(0)) == 5


def test_traced_numbers_in_lanes():
    checked(lambda weight_decay: layerwise.layer_by_layer(optax.lamb(0.1, weight_decay=weight_decay)), weight_decay=0.1)


def test_without_layers_it_is_the_transform_itself():
    params = {"wte": {"embedding": jnp.ones((4, 8))}}
    transform = layerwise.layer_by_layer(optax.lamb(0.1))
    updates, _ = transform.update(params, transform.init(params), params)
    expected, _ = optax.lamb(0.1).update(params, optax.lamb(0.1).init(params), params)
    np.testing.assert_array_equal(updates["wte"]["embedding"], expected["wte"]["embedding"])
