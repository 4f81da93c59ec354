import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from jaxlm import tree
from jaxlm.errors import ConfigError
from jaxlm.optim import transforms
from tests.optim.trajectory import GRADIENTS, PARAMS, STEPS, assert_close, checked, leaf, trajectory

HIDDEN = ["h/attn/c_attn/kernel", "h/attn/c_proj/kernel", "h/mlp/c_fc/kernel", "h/mlp/c_proj/kernel"]
NUMBERS = {"beta": 0.9, "eps": 1e-6}


def kernels(params):
    """The part of a tree that `scale_by_muon` takes."""
    parts = {part: params["h"][part] for part in ("attn", "mlp")}
    return {"h": {part: {name: {"kernel": parts[part][name]["kernel"]} for name in parts[part]} for part in parts}}


def newton_schulz(x, eps, steps=5):
    """Of one matrix, by the coefficients of the author's code."""
    wide = x if x.shape[0] <= x.shape[1] else x.T
    wide = wide / (np.linalg.norm(wide) + eps)
    for _ in range(steps):
        a = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * a + 2.0315 * a @ a) @ wide
    return wide if x.shape[0] <= x.shape[1] else wide.T


def muon(gradients, beta, eps, consistent_rms=None):
    """The updates of one matrix."""
    m, out = 0.0, []
    for t, g in enumerate(gradients, 1):
        m = beta * m + (1 - beta) * g
        ahead = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        fan_in, fan_out = g.shape
        scale = max(1, fan_out / fan_in) ** 0.5
        if consistent_rms is not None:
            scale = max(fan_in, fan_out) ** 0.5 * consistent_rms
        out.append(scale * newton_schulz(ahead, eps))
    return np.array(out)


def nadam(gradients, b1, b2, eps):
    m = v = 0.0
    out = []
    for t, g in enumerate(gradients, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        ahead = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        out.append(ahead / (np.sqrt(v / (1 - b2**t)) + eps))
    return np.array(out)


def by_matrix(path, split=True, **numbers):
    """The reference of [steps, L, in, out], layer by layer; c_attn's queries, keys and values one by one."""
    gradients = leaf(GRADIENTS, path)
    parts = np.split(gradients, 3, axis=-1) if split and "c_attn" in path else [gradients]
    layers = range(gradients.shape[1])
    return np.concatenate(
        [np.stack([muon(part[:, layer], **numbers) for layer in layers], axis=1) for part in parts], axis=-1
    )


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("rms", [{}, {"consistent_rms": 0.2}], ids=["width", "rms"])
def test_scale_by_muon_orthogonalises_each_layer_of_each_kernel(split, rms):
    make = functools.partial(transforms.scale_by_muon, split_attention=split)
    updates, _, _ = checked(make, kernels(GRADIENTS), kernels(PARAMS), rtol=1e-3, atol=1e-4, **NUMBERS, **rms)
    for path in HIDDEN:
        expected = by_matrix(path, split, **NUMBERS, **rms)
        np.testing.assert_allclose(leaf(updates, path), expected, rtol=1e-3, atol=1e-3, err_msg=path)


@pytest.mark.parametrize("path", ["wte/embedding", "lm_head/kernel", "h/ln_1/bias", "h/mlp/c_fc/bias"])
def test_scale_by_muon_refuses_what_is_no_layers_kernel(path):
    params = kernels(PARAMS)
    node = params
    *parents, name = path.split("/")
    for key in parents:
        node = node.setdefault(key, {})
    node[name] = jnp.asarray(leaf(PARAMS, path))
    for call in (transforms.scale_by_muon().init, lambda p: transforms.scale_by_muon().update(p, None)):
        with pytest.raises(ConfigError, match=f"'{path}' is none: give scale_by_muon where="):
            call(params)


def test_muon_takes_the_layers_kernels_and_leaves_all_else_to_adam():
    make = functools.partial(transforms.muon, nesterov=True)
    numbers = {"learning_rate": 0.1, "adam_learning_rate": 0.01, "weight_decay": 0.0, "adam_b1": 0.8, "adam_b2": 0.9}
    updates, _, state = checked(make, rtol=1e-3, atol=1e-4, **NUMBERS, **numbers)
    for path in tree.paths(PARAMS):
        if path in HIDDEN:
            expected = -0.1 * by_matrix(path, **NUMBERS)
        else:
            expected = -0.01 * nadam(leaf(GRADIENTS, path), b1=0.8, b2=0.9, eps=1e-6)
        np.testing.assert_allclose(leaf(updates, path), expected, rtol=1e-3, atol=1e-4, err_msg=path)
    hidden = sum(leaf(PARAMS, path).size for path in HIDDEN)
    moments = tree.size(state) - 5  # two counts and Muon's three coefficients
    assert moments == hidden + 2 * (tree.size(PARAMS) - hidden)


def test_muon_without_splitting_is_optaxs_with_dimension_numbers_of_stacked_layers():
    def dimensions(params):
        return jax.tree_util.tree_map_with_path(
            lambda key_path, _: optax.contrib.MuonDimensionNumbers(1, 2) if tree.path_of(key_path) in HIDDEN else None,
            params,
        )

    numbers = {"learning_rate": lambda count: 0.1 / (1 + count), "weight_decay": 0.1, "consistent_rms": 0.2}
    ours = trajectory(transforms.muon(**numbers, split_attention=False))
    theirs = trajectory(optax.contrib.muon(**numbers, muon_weight_dimension_numbers=dimensions))
    assert_close(ours[0], theirs[0])


def test_optaxs_muon_by_itself_would_take_biases_and_embeddings_for_matrices():
    theirs = trajectory(optax.contrib.muon(0.1))[0]
    bias, kernel = (leaf(GRADIENTS, f"h/mlp/c_fc/{name}") for name in ("bias", "kernel"))
    taken = -0.1 * muon(bias, beta=0.95, eps=1e-8)  # [L, F]: the layers for a matrix's rows
    left = -0.1 * nadam(kernel, b1=0.9, b2=0.999, eps=1e-8)
    np.testing.assert_allclose(leaf(theirs, "h/mlp/c_fc/bias"), taken, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(leaf(theirs, "h/mlp/c_fc/kernel"), left, rtol=1e-3, atol=1e-4)


def test_decay_is_of_matrices_only():
    still = jax.tree.map(jnp.zeros_like, GRADIENTS)
    _, params, _ = trajectory(transforms.muon(0.1, weight_decay=1.0, adam_weight_decay=0.5), still)
    for path in tree.paths(PARAMS):
        rate = 0.1 if path in HIDDEN else 0.05 if path.endswith(("embedding", "kernel")) else 0.0
        expected = leaf(PARAMS, path) * (1 - rate) ** STEPS
        np.testing.assert_allclose(leaf(params, path)[-1], expected, rtol=1e-4, err_msg=path)
