import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config, optim, tree
from jaxlm.model import gpt2
from jaxlm.optim import chain
from jaxlm.optim.stages import stages
from jaxlm.optim.ways import trained
from tests.optim.small import DEFAULT, PARAMS
from tests.tiny import resolved


def test_decay_is_of_kernels_by_default():
    explained = optim.explain(DEFAULT, PARAMS)
    assert explained["h/attn/kernel"].stages == DEFAULT["chain"]
    others = tuple(name for name in DEFAULT["chain"] if name != "add_decayed_weights")
    assert {explained[path].stages for path in tree.paths(PARAMS) if path != "h/attn/kernel"} == {others}


def test_explain_tells_decay_multiplier_and_state_bytes():
    spec = {
        "chain": ("scale_by_adam", "add_decayed_weights", "slower", "scale_by_learning_rate"),
        "add_decayed_weights": {"weight_decay": 0.1, "where": "kernels"},
        "slower": {"transform": "scale", "step_size": 0.25, "where": "embeddings"},
        "scale_by_learning_rate": {"peak": 1e-3},
    }
    explained = optim.explain(spec, PARAMS)
    kernel, embedding = explained["h/attn/kernel"], explained["wte/embedding"]
    assert (kernel.decay, kernel.multiplier, kernel.state_bytes) == (0.1, 1.0, 2 * 4 * 24)
    assert (embedding.decay, embedding.multiplier, embedding.state_bytes) == (0.0, 0.25, 2 * 4 * 28)


def test_explain_counts_state_in_float32_as_a_step_holds_it():
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    assert optim.explain(DEFAULT, half) == optim.explain(DEFAULT, PARAMS)


def test_explain_goes_through_partitions():
    spec = {
        "chain": ("clip_by_global_norm", "partition"),
        "clip_by_global_norm": {"max_norm": 1.0},
        "partition": {
            "matrices": {"where": "kernels", "chain": ("sgd",)},
            "table": {"where": "embeddings", "chain": ()},
            "others": {"where": "rest", "chain": ("adamw",)},
        },
        "sgd": {"learning_rate": 0.5, "momentum": 0.9},
        "adamw": {"peak": 0.25, "weight_decay": 0.0},
    }
    explained = optim.explain(spec, PARAMS)
    assert explained["h/attn/kernel"] == (("clip_by_global_norm", "sgd"), 0.0, 1.0, 1.0, 4 * 24)
    assert explained["wte/embedding"] == (("clip_by_global_norm",), 0.0, 0.0, 0.0, 0)
    assert explained["h/ln_1/scale"] == (("clip_by_global_norm", "adamw"), 0.0, 0.5, 0.5, 2 * 4 * 4)


def test_explain_takes_lengths_in_steps():
    rate = {"peak": 1e-3, "schedule": "join", "boundaries": 400}
    assert optim.explain({**DEFAULT, "scale_by_learning_rate": rate}, PARAMS)


def test_explain_takes_a_factor_that_follows_a_schedule_at_its_peak():
    factor = {"step_size": {"peak": 0.5, "schedule": "linear"}}
    spec = optim.insert_after(DEFAULT, "scale_by_learning_rate", "scale", **factor)
    assert {touched.multiplier for touched in optim.explain(spec, PARAMS).values()} == {0.5}


def test_explain_tells_the_rates_of_layers_as_they_are():
    spec = {"chain": ("scale_by_layer", "sgd"), "scale_by_layer": {"decay": 0.5}, "sgd": {"peak": 0.1}}
    model = jax.eval_shape(gpt2.build(resolved(model__num_layers=3).model).init, jax.random.key(0))
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), model)
    updates = chain.build(spec, None, 10).update(ones, chain.build(spec, None, 10).init(ones), ones)[0]
    explained = optim.explain(spec, model)
    for path, update in zip(tree.paths(updates), jax.tree.leaves(updates), strict=True):
        first, last = (float(update[i].ravel()[0]) / -0.1 for i in (0, -1))
        np.testing.assert_allclose((explained[path].first_layer, explained[path].multiplier), (first, last), rtol=1e-6)
    last = {**spec, "chain": ("train_last_layers", "scale_by_layer", "sgd"), "train_last_layers": {"count": 2}}
    kernel = optim.explain(last, model)["h/mlp/c_fc/kernel"]
    assert (kernel.first_layer, kernel.multiplier) == (0, 0.5)


@pytest.mark.parametrize("rate", [0.25, {"peak": 0.25, "schedule": "linear"}])
def test_explain_tells_the_rate_of_muons_adam(rate):
    spec = {"chain": ("muon",), "muon": {"peak": 0.5, "adam_learning_rate": rate}}
    model = gpt2.shapes(resolved().model)
    multipliers = {path: touched.multiplier for path, touched in optim.explain(spec, model).items()}
    assert multipliers["h/attn/c_attn/kernel"] == 1.0
    assert multipliers["h/attn/c_attn/bias"] == multipliers["wte/embedding"] == 0.5


def test_mechanize_decays_no_parameter():
    spec = optim.insert_before(DEFAULT, "clip_by_global_norm", "mechanize")
    assert optim.check(spec, PARAMS) == []
    decays = {path: touched.decay for path, touched in optim.explain(spec, PARAMS).items()}
    assert decays["h/attn/kernel"] == 0.1 and decays["wte/embedding"] == 0


def test_explain_needs_shapes_only_also_of_gpt2():
    c = config.override(
        config.default(),
        {"model.num_layers": 12, "model.num_heads": 12, "model.embed_dim": 768, "model.vocab_size": 50257},
    )
    shapes = gpt2.shapes(config.resolve(c).model)
    explained = optim.explain(DEFAULT, shapes)
    assert sum(touched.state_bytes for touched in explained.values()) == 2 * 4 * tree.size(shapes)


def test_what_trains_is_neither_frozen_nor_below_the_last_layers():
    spec = {"chain": ("freeze", "train_last_layers", "sgd"), "sgd": {"learning_rate": 0.1}}
    spec |= {"freeze": {"where": "embeddings"}, "train_last_layers": {"count": 1}}
    params = jax.tree.map(lambda x: jnp.ones(x.shape), gpt2.shapes(resolved(model__num_layers=3).model))
    found = trained(stages(spec), params)
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(found):
        part = leaf[:-1] if tree.of_layers(key_path) else leaf[:0]
        is_table = "embedding" in tree.path_of(key_path)
        assert not part.any() and leaf.any() == (not is_table), key_path
        assert is_table or (leaf[len(part) :] == 1).all()
    groups = {"tables": {"where": "wpe", "chain": ()}, "others": {"where": "rest", "chain": ("sgd",)}}
    found = trained(stages({**spec, "chain": ("partition",), "partition": groups}), params)
    assert not found["wpe"]["embedding"].any() and found["wte"]["embedding"].all()
