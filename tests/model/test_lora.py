"""Low-rank adaptation: the same function to begin with, a small part that trains, and a product that is folded in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import config, tree
from jaxlm.errors import ConfigError
from jaxlm.evals import perplexity
from jaxlm.model import gpt2, lora
from jaxlm.telemetry import flops
from jaxlm.training import sanity, step
from jaxlm.training.export import export
from tests.tiny import assert_same_bits, batch, resolved, tiny

WHERE = "kernel$|wte/embedding"
ON = {"model__lora__rank": 2, "model__lora__where": WHERE}
FROZEN = {
    "optimizer__chain": ("freeze", "clip_by_global_norm", "scale_by_adam", "scale_by_learning_rate"),
    "optimizer__freeze": {"where": "^(?!lora/)"},
}
TOKENS = {"inputs": np.arange(32, dtype=np.int32).reshape(2, 16)}


def model(**changes):
    cfg = resolved(**changes)
    built = gpt2.build(cfg.model)
    return built, built.init(jax.random.key(0)), cfg.model.lora


def trained(params):
    """The same, with products that are not zero."""
    thin = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params["lora"])
    return params | {"lora": thin}


def test_at_first_the_function_is_what_it_was():
    plain, base, _ = model()
    adapted, params, section = model(**ON)
    assert_same_bits({name: part for name, part in params.items() if name != "lora"}, base)
    assert_same_bits(adapted.apply(params, TOKENS), plain.apply(base, TOKENS))
    assert params["lora"]["h"]["attn"]["c_attn"]["kernel"]["a"].shape == (1, 16, 2)
    assert params["lora"]["h"]["attn"]["c_attn"]["kernel"]["b"].shape == (1, 2, 48)
    assert params["lora"]["wte"]["embedding"]["b"].shape == (2, 16)
    assert "lora" not in base and lora.merged(base, section) is base


def test_what_pads_the_vocabulary_is_zero_and_no_parameter():
    _, params, _ = model(**ON)
    a = params["lora"]["wte"]["embedding"]["a"]
    assert a.shape == (384, 2) and np.all(a[:257] != 0) and not np.any(a[257:])
    assert flops.padding(params, 257) == (384 - 257) * (16 + 2)
    head = {"kernel": np.zeros((16, 384))}
    product = {"kernel": {"a": np.zeros((16, 384)), "b": np.zeros((384, 384))}}  # a rank as large as the vocabulary
    both = params | {"lm_head": head, "lora": params["lora"] | {"lm_head": product}}
    assert flops.padding(both, 257) == (384 - 257) * (16 + 2 + 16 + 384)
    plain = {name: part for name, part in params.items() if name != "lora"}
    assert flops.matmul_size(params, 257) == flops.matmul_size(plain, 257)


def test_merged_parameters_give_the_same_logits():
    plain, _, _ = model()
    adapted, params, section = model(**ON)
    params = trained(params)
    expected = adapted.apply(params, TOKENS)
    assert (
        np.abs(
            expected - adapted.apply(lora.added(plain.init(jax.random.key(0)), section, jax.random.key(0), 257), TOKENS)
        ).max()
        > 0.1
    )
    np.testing.assert_allclose(plain.apply(lora.merged(params, section), TOKENS), expected, rtol=1e-5, atol=1e-5)
    starts, slots = jnp.zeros(2, jnp.int32), 16
    last, _ = adapted.prefill(adapted.unstack(params), TOKENS["inputs"], starts, slots)
    np.testing.assert_allclose(last, expected[:, -1], rtol=1e-4, atol=1e-5)


def test_the_product_is_scaled_by_alpha_over_rank():
    _, params, section = model(**ON, model__lora__alpha=6.0)
    params = trained(params)
    thin = params["lora"]["h"]["mlp"]["c_fc"]["kernel"]
    expected = params["h"]["mlp"]["c_fc"]["kernel"] + 3.0 * np.einsum("lmr,lrn->lmn", thin["a"], thin["b"])
    np.testing.assert_allclose(
        lora.merged(params, section)["h"]["mlp"]["c_fc"]["kernel"], expected, rtol=1e-5, atol=1e-7
    )


@pytest.fixture(scope="module")
def program():
    """(the program in which thin matrices train, its first state, the compiled step)"""
    structure, hparams = step.split(resolved(**ON, **FROZEN))
    built = step.build(structure)
    return built, built.init(jax.random.key(0), hparams), functools.partial(jax.jit(built.train_step), hparams)


def test_only_the_thin_matrices_train_and_have_optimizer_memory(program):
    _, state, train_step = program
    after = state
    for n in range(4):  # the first step's rate is 0, and a moves once b has
        after, _ = train_step(after, batch(seed=n))
    before, now = ({n: p for n, p in s.params.items() if n != "lora"} for s in (state, after))
    assert_same_bits(before, now)
    moved = jax.tree.map(lambda x, y: bool(np.any(x != y)), state.params["lora"], after.params["lora"])
    assert all(jax.tree.leaves(moved))
    numbers = sum(x.size for x in jax.tree.leaves(state.opt_state))
    assert 2 * tree.size(state.params["lora"]) <= numbers <= 2 * tree.size(state.params["lora"]) + 8


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """(folder, parameters of the run that it begins with, parameters of the run in `folder`/run)"""
    folder = tmp_path_factory.mktemp("lora")
    base = jaxlm.train(tiny(steps=4), folder / "base")
    fields = {"init_from": str(folder / "base"), "optimizer__scale_by_learning_rate__peak": 0.05}
    run = jaxlm.train(tiny(**ON, **FROZEN, **fields), folder / "run")
    return folder, base.state.params, run.state.params


@pytest.mark.slow
def test_an_export_has_the_products_folded_in(tuned, tmp_path):
    folder, _, trained = tuned
    built, params, _, _ = jaxlm.load(folder / "run")
    assert_same_bits(params, trained)
    export(folder / "run", tmp_path / "out")
    merged, theirs, _, config = jaxlm.load(tmp_path / "out")
    assert config.model.lora.rank == 0 and "lora" not in theirs
    expected = built.apply(params, TOKENS)
    np.testing.assert_allclose(merged.apply(theirs, TOKENS), expected, rtol=1e-5, atol=1e-5)
    plain = built.apply(params | {"lora": jax.tree.map(jnp.zeros_like, params["lora"])}, TOKENS)
    assert np.abs(plain - expected).max() > 1e-2


@pytest.mark.slow
def test_a_run_begins_with_a_model_and_adds_products(tuned, tmp_path):
    folder, base, trained = tuned
    assert_same_bits({name: part for name, part in trained.items() if name != "lora"}, base)
    assert "warning: model.lora" not in (folder / "run" / "log.txt").read_text()
    again = jaxlm.train(tiny(init_from=str(folder / "run"), steps=1), tmp_path / "again")  # folded in
    assert "lora" not in again.state.params


def test_what_is_no_matrix_and_what_matches_nothing():
    with pytest.raises(ConfigError, match="model.lora.where='attn' matches h/attn/c_attn/bias, which is no matrix"):
        model(model__lora__rank=2, model__lora__where="attn")
    with pytest.raises(ConfigError, match="where='nothing' matches no parameter"):
        model(model__lora__rank=2, model__lora__where="nothing")


def test_products_beside_parameters_that_train_are_doubted():
    assert any("model.lora is on, and h/attn/c_attn/bias and 15 others are" in x for x in sanity.check(resolved(**ON)))
    assert not any("model.lora" in line for line in sanity.check(resolved(**ON, **FROZEN)))
    some = FROZEN | {"optimizer__freeze": {"where": "^(?!lora/|ln_f/bias)"}}
    assert any("and ln_f/bias is trained too" in line for line in sanity.check(resolved(**ON, **some)))
    with pytest.raises(ConfigError, match="model.lora is on, and ln_f/bias is trained too"):
        sanity.check(resolved(**ON, **some, strict=True))


def test_the_named_masks_take_the_thin_matrices_with_those_that_they_are_beside():
    _, params, _ = model(**ON)
    groups = [tree.mask(params, name) for name in tree.GROUPS if name != "all"]
    assert all(sum(here) == 1 for here in zip(*map(jax.tree.leaves, groups), strict=True))
    assert groups[0]["lora"]["h"]["attn"]["c_attn"]["kernel"] == {"a": True, "b": True}
    assert groups[1]["lora"]["wte"]["embedding"] == {"a": True, "b": True}
    chain = ("freeze", *config.default().optimizer.chain)  # with the decay of kernels
    assert not sanity.check(resolved(**ON, **FROZEN | {"optimizer__chain": chain}, strict=True))


def test_penalties_and_the_gradient_norm_are_of_what_trains(program):
    """A frozen matrix's penalty is a constant, and its gradient moves nothing."""
    model, state, train_step = program[0].model, *program[1:]
    state = state._replace(params=trained(state.params))
    plain = train_step(state, batch())[1]
    structure, hparams = step.split(resolved(**ON, **FROZEN, loss__l2=0.5))
    penalised = jax.jit(step.build(structure).train_step)(hparams, state, batch())[1]

    kernels = [x for path, x in zip(tree.paths(state.params), jax.tree.leaves(state.params)) if "kernel/" in path]
    extra = penalised["train/objective"] - plain["train/objective"]
    np.testing.assert_allclose(extra, sum(0.25 * np.square(x).sum() for x in kernels), rtol=1e-4)

    def loss(thin):
        sums = perplexity.token_sums(model, state.params | {"lora": thin}, batch())
        return sums.nll / batch()["weights"].sum()

    grads = jax.grad(loss)(state.params["lora"])
    np.testing.assert_allclose(plain["optim/grad_norm"], tree.norm(grads), rtol=1e-4)
    grads = jax.tree_util.tree_map_with_path(
        lambda path, g, x: g + 0.5 * x if "kernel" in tree.path_of(path) else g, grads, state.params["lora"]
    )
    np.testing.assert_allclose(penalised["optim/grad_norm"], tree.norm(grads), rtol=1e-4)
