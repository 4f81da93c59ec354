import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config, tree
from jaxlm.errors import ConfigError
from jaxlm.model import gpt2

SHAPES = jax.eval_shape(
    gpt2.build(config.override(config.default(), {"model.vocab_size": 5, "model.tie_embeddings": False}).model).init,
    jax.random.key(0),
)


def chosen(where):
    return {path for path, on in zip(tree.paths(SHAPES), jax.tree.leaves(tree.mask(SHAPES, where))) if on}


def test_paths_are_in_the_order_of_the_leaves():
    params = {"b": {"kernel": 1, "bias": 2}, "a": [3, (4, 5)]}
    assert tree.paths(params) == ["a/0", "a/1/0", "a/1/1", "b/bias", "b/kernel"]
    assert jax.tree.leaves(params) == [3, 4, 5, 2, 1]


def test_what_is_stacked_by_layer_is_told_by_its_path():
    state = {"opt": {"mu": {"h": {"x": 0}, "wte": {"h": 1}}}, "h": {"y": 2}}
    found = jax.tree_util.tree_map_with_path(lambda path, _: tree.of_layers(path), state)
    assert found == {"opt": {"mu": {"h": {"x": True}, "wte": {"h": False}}}, "h": {"y": True}}


def test_the_embeddings_are_farthest_below_the_head():
    assert tree.num_layers({"wte": jnp.ones(9), "h": {"a": jnp.ones((3, 2))}}) == 3 and tree.num_layers({}) == 0
    assert tree.below_head("h/attn/kernel", 3) == tree.below_head("lora/h/attn/kernel/a", 3) == (3, 2, 1)
    assert tree.below_head("wte/embedding", 3) == tree.below_head("lora/wpe/embedding/b", 3) == (4,)
    assert tree.below_head("ln_f/bias", 3) == tree.below_head("lm_head/kernel", 3) == (0,)


def test_groups_part_gpt2():
    groups = [chosen(name) for name in tree.GROUPS if name != "all"]
    assert sum(map(len, groups)) == len(set.union(*groups)), "a parameter is in two groups"
    assert set.union(*groups) == chosen("all") == set(tree.paths(SHAPES))


def test_kernels_are_the_matrices_and_nothing_else_that_is_stacked():
    assert chosen("kernels") == {
        "h/attn/c_attn/kernel",
        "h/attn/c_proj/kernel",
        "h/mlp/c_fc/kernel",
        "h/mlp/c_proj/kernel",
        "lm_head/kernel",
    }


@pytest.mark.parametrize(
    ("where", "paths"),
    [
        ("embeddings", {"wte/embedding", "wpe/embedding"}),
        ("norms", {f"{norm}/{leaf}" for norm in ("h/ln_1", "h/ln_2", "ln_f") for leaf in ("scale", "bias")}),
        ("biases", {f"h/{name}/bias" for name in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")}),
        ("mlp/.*kernel", {"h/mlp/c_fc/kernel", "h/mlp/c_proj/kernel"}),
        ("^wte", {"wte/embedding"}),
        ("embeddings|^ln_f", {"wte/embedding", "wpe/embedding", "ln_f/scale", "ln_f/bias"}),
    ],
)
def test_a_mask_matches_by_path(where, paths):
    assert chosen(where) == paths


def test_a_mask_is_shaped_like_its_tree():
    assert jax.tree.structure(tree.mask(SHAPES, "norms")) == jax.tree.structure(SHAPES)


def test_a_mask_that_matches_nothing_names_groups_and_paths():
    with pytest.raises(ConfigError, match="'kernles' matches no parameter") as caught:
        tree.mask(SHAPES, "kernles")
    assert all(name in str(caught.value) for name in [*tree.GROUPS, *tree.paths(SHAPES)])


@pytest.mark.parametrize("where", ["(", "*", 5])
def test_what_is_no_regex_is_refused(where):
    with pytest.raises(ConfigError, match=re.escape(f"where={where!r} is neither one of kernels,")):
        tree.mask(SHAPES, where)


def test_size_counts_numbers():
    assert tree.size({"a": jnp.zeros((3, 4)), "b": [jnp.float32(0), jax.ShapeDtypeStruct((5,), jnp.int32)]}) == 18


def test_norm_is_that_of_all_leaves_together():
    rng = np.random.default_rng(0)
    leaves = [rng.normal(size=shape).astype(np.float32) for shape in [(3, 4), (5,), ()]]
    expected = np.linalg.norm(np.concatenate([leaf.ravel() for leaf in leaves]))
    np.testing.assert_allclose(
        tree.norm({"a": leaves[0], "b": [jnp.asarray(leaves[1]), leaves[2]]}), expected, rtol=1e-6
    )


def test_norm_adds_in_float32():
    ones = jnp.ones(10_000, jnp.bfloat16)  # in bfloat16 the sum of squares is 9984
    assert tree.norm([ones]) == 100 and tree.norm([ones]).dtype == jnp.float32


def test_norm_of_nothing_is_zero():
    assert tree.norm({}) == 0
