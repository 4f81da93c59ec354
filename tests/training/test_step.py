import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import config
from jaxlm.errors import ConfigError
from jaxlm.optim import schedules
from jaxlm.training import sanity, step, steps
from tests.tiny import assert_same_bits, batch, leaves, resolved

PEAK = "optimizer__scale_by_learning_rate__peak"
# updates are minus the gradients: parameters after one step show them
GRADIENTS = {"optimizer__chain": ("scale_by_learning_rate",), PEAK: 1.0} | {
    "optimizer__scale_by_learning_rate__schedule": "constant",
    "optimizer__scale_by_learning_rate__warmup": 0.0,
}

RATE = {"scale_by_learning_rate": {"peak": 1e-3}}


def program(**changes):
    """A program with its steps compiled, its hyperparameters, and the state that it begins with."""
    return _program(resolved(**changes))


@functools.lru_cache
def _program(cfg):
    structure, hparams = step.split(cfg)
    built = step.build(structure)
    compiled = built._replace(train_step=jax.jit(built.train_step), eval_step=jax.jit(built.eval_step))
    return compiled, hparams, jax.jit(built.init)(jax.random.key(0), hparams)


def run(train_step, hparams, state, steps):
    losses = []
    for n in range(steps):
        state, metrics = train_step(hparams, state, batch(seed=n))
        losses.append(metrics["train/loss"])
    return state, np.array(losses)


def test_golden_step():
    """The numbers of one step. Where a change is meant to move them, print the new ones, put them here, and say why
    in the commit: `pytest tests/training/test_step.py -k golden` shows them in its failure."""
    built, hparams, state = program(model__dropout=0.1, loss__z_loss=1e-4, loss__label_smoothing=0.1, loss__l2=1e-3)
    state, _ = built.train_step(hparams, state, batch(seed=1))
    state, metrics = built.train_step(hparams, state, batch(seed=2))
    golden = {
        "train/loss": 5.52252,
        "train/objective": 5.52908,
        "train/accuracy": 0.0153852,
        "optim/learning_rate": 0.000965746,
        "optim/grad_norm": 0.990801,
        "optim/update_norm": 0.0668515,
        "optim/param_norm": 7.12443,
        "optim/skipped": 0.0,
    }
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(golden, rel=1e-4)


def test_the_same_arguments_give_the_same_bits():
    built, hparams, state = program(model__dropout=0.2)
    first, second = (built.train_step(hparams, state, batch()) for _ in range(2))
    assert_same_bits(first, second)


def test_five_learning_rates_share_one_compilation():
    traces = []
    structures = set()
    compiled = None
    for peak in (1e-5, 1e-4, 1e-3, 1e-2, 1.0):
        structure, hparams = step.split(resolved(**{PEAK: peak}, optimizer__scale_by_adam__b2=1 - peak / 2))
        structures.add(structure)
        built = step.build(structure)
        if compiled is None:

            def counted(*args, train_step=built.train_step):
                traces.append(1)
                return train_step(*args)

            compiled = jax.jit(counted)
        _, metrics = compiled(hparams, jax.jit(built.init)(jax.random.key(0), hparams), batch())
    assert len(structures) == len(traces) == compiled._cache_size() == 1
    assert metrics["optim/learning_rate"] == 1  # the last peak: 2% of 8 steps are no warmup


def test_lanes_equal_solo_runs():
    peaks, seeds = (1e-4, 1e-3, 1e-2), (0, 1)
    variants = [(peak, seed) for peak in peaks for seed in seeds]
    hparams, states, solo = [], [], []
    built = step.build(step.split(resolved(model__dropout=0.1, steps=20))[0])
    init = jax.jit(built.init)
    for peak, seed in variants:
        _, numbers = step.split(resolved(**{PEAK: peak}, model__dropout=0.1, steps=20))
        hparams.append(numbers)
        states.append(init(jax.random.key(seed), numbers))
    train_step = jax.jit(built.train_step)
    for numbers, state in zip(hparams, states, strict=True):
        solo.append(run(train_step, numbers, state, 20)[1])

    def stack(*leaves):
        return jnp.stack(leaves)

    lanes = jax.jit(jax.vmap(built.train_step, in_axes=(0, 0, None)))
    _, together = run(lanes, jax.tree.map(stack, *hparams), jax.tree.map(stack, *states), 20)
    np.testing.assert_allclose(together.T, solo, rtol=1e-4)
    assert len({float(losses[-1]) for losses in solo}) == len(variants)  # lanes that were all alike prove nothing


def test_micro_batches_change_neither_loss_nor_gradients():
    whole, hparams, state = program(**GRADIENTS, loss__z_loss=1e-3, loss__l2=1e-2)
    split, _, _ = program(**GRADIENTS, loss__z_loss=1e-3, loss__l2=1e-2, data__micro_batches=4)
    state_a, a = whole.train_step(hparams, state, batch())
    state_b, b = split.train_step(hparams, state, batch())
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=name)
    for path, gradient in leaves(jax.tree.map(jnp.subtract, state.params, state_a.params)).items():
        other = leaves(jax.tree.map(jnp.subtract, state.params, state_b.params))[path]
        assert np.linalg.norm(gradient - other) <= 1e-5 * np.linalg.norm(gradient), path


def test_micro_batches_change_no_evaluation_and_take_less_memory_there():
    whole, _, state = program()
    split, _, _ = program(data__micro_batches=4)
    expected, found = whole.eval_step(state, batch()), split.eval_step(state, batch())
    np.testing.assert_allclose(found, expected, rtol=1e-5)

    def temporary(program):
        compiled = program.eval_step.lower(state, batch(64, 16)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(split) < 1.3 * temporary(whole) / 4


def test_micro_batches_take_less_memory_where_a_stage_differentiates_the_loss_too():
    def temporary(parts):
        chain = {"optimizer__chain": ("sam", "scale_by_learning_rate"), "optimizer__sam__rho": 0.05}
        cfg = resolved(data__micro_batches=parts, data__batch_size=64, model__embed_dim=64, **chain)
        structure, hparams = step.split(cfg)
        program = step.build(structure)
        state = jax.eval_shape(program.init, jax.random.key(0), hparams)
        compiled = jax.jit(program.train_step).lower(hparams, state, batch(64)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(8) < temporary(1) / 3


def test_what_skip_nonfinite_holds_back_is_skipped():
    raw = resolved().to_dict()
    bad = optax.stateless(lambda updates, params: jax.tree.map(lambda u: u * jnp.inf, updates))
    raw["optimizer"] = {
        "chain": ("partition",),
        "partition": {
            "bad": {"where": "kernels", "chain": ("skip_nonfinite", "bad")},
            "good": {"where": "rest", "chain": ("sgd",)},
        },
        "bad": {"transform": bad},
        "sgd": {"learning_rate": 0.1},
    }
    structure, hparams = step.split(config.resolve(config.ConfigDict(raw)))
    built = step.build(structure)
    state = built.init(jax.random.key(0), hparams)
    moved, metrics = jax.jit(built.train_step)(hparams, state, batch())
    assert metrics["optim/skipped"] == 1 and metrics["optim/update_norm"] > 0
    before, after = leaves(state.params), leaves(moved.params)
    assert {path for path in before if np.array_equal(before[path], after[path])} >= {
        path for path in before if path.endswith("kernel")
    }


def test_loss_is_the_weighted_mean_over_the_batch():
    built, hparams, state = program()
    data = batch()
    _, metrics = built.train_step(hparams, state, data)
    logits = np.asarray(built.model.apply(state.params, data), np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, data["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(metrics["train/loss"], np.average(nll, weights=data["weights"]), rtol=1e-5)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_batch_without_weight_has_no_loss_and_changes_nothing(micro_batches):
    built, hparams, state = program(data__micro_batches=micro_batches)
    empty = batch() | {"weights": np.zeros((4, 16), np.float32)}
    after, metrics = built.train_step(hparams, state, empty)
    assert np.isnan(metrics["train/loss"]) and metrics["optim/skipped"] == 1
    assert_same_bits((after.params, after.opt_state), (state.params, state.opt_state))


def test_learning_rate_in_the_metrics_is_the_schedule_times_the_peak():
    built, hparams, state = program(steps=20)
    train_step = built.train_step
    shape = schedules.warmup_cosine(20, warmup=0.02, final=0.1)
    for n in range(3):
        state, metrics = train_step(hparams, state, batch())
        np.testing.assert_allclose(metrics["optim/learning_rate"], 1e-3 * shape(n), rtol=1e-6)


def test_learning_rate_in_the_metrics_is_the_applied_one_after_a_step_that_was_skipped():
    built, hparams, state = program(
        optimizer__scale_by_learning_rate={"peak": 1.0, "schedule": "linear", "final": 0.0}, steps=4
    )
    train_step, rates = built.train_step, []
    for weight in (1.0, np.inf, 1.0):
        one = batch() | {"weights": np.full_like(batch()["weights"], weight)}
        state, metrics = train_step(hparams, state, one)
        rates.append((float(metrics["optim/learning_rate"]), float(metrics["optim/skipped"])))
    assert rates == [(1.0, 0.0), (0.75, 1.0), (0.75, 0.0)]


def test_penalties_add_to_the_objective_and_not_to_the_loss():
    plain, hparams, state = program()
    _, a = plain.train_step(hparams, state, batch())
    penalised, strong, _ = program(loss__l1=0.5, loss__l2=0.25)
    _, b = penalised.train_step(strong, state, batch())
    kernels = [x.astype(np.float64) for path, x in leaves(state.params).items() if path.endswith("kernel")]
    expected = sum(0.5 * np.abs(w).sum() + 0.125 * (w**2).sum() for w in kernels)
    np.testing.assert_allclose(b["train/objective"] - a["train/objective"], expected, rtol=1e-4)
    assert a["train/loss"] == b["train/loss"]


def test_dropout_differs_from_step_to_step_and_is_off_in_evaluation():
    built, hparams, state = program(model__dropout=0.5)
    _, first = built.train_step(hparams, state, batch())
    _, second = built.train_step(hparams, state._replace(step=jnp.int32(1)), batch())
    assert first["train/loss"] != second["train/loss"]
    sums = built.eval_step(state, batch())
    undropped, _, _ = program()
    _, plain = undropped.train_step(hparams, state, batch())
    np.testing.assert_allclose(sums.nll / sums.weight, plain["train/loss"], rtol=1e-6)


def test_bfloat16_compute_keeps_float32_parameters_and_follows_float32():
    exact, hparams, state = program(steps=20)
    rough, _, _ = program(model__dtype="bfloat16", steps=20)
    _, a = run(exact.train_step, hparams, state, 10)
    end, b = run(rough.train_step, hparams, state, 10)
    assert {x.dtype for x in jax.tree.leaves(end.params)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(a, b, rtol=2e-2)
    assert not np.array_equal(a, b)


def test_float16_loses_no_gradient_where_a_batch_has_many_tokens():
    """Of which each has a share in the mean that is less than float16 can carry."""
    after = []
    for dtype in ("float32", "float16"):
        built, hparams, state = program(**GRADIENTS, model__dtype=dtype)
        end, _ = built.train_step(hparams, state, batch(rows=2048))
        steps = jax.tree.map(jnp.subtract, end.params, state.params)
        after.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(steps)]))
    exact, rough = after
    assert np.linalg.norm(rough - exact) < 0.005 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    "tables",
    [
        {"scale_by_adam": {}, **RATE},
        {"trace": {"decay": 0.9}, **RATE},
        {"scale_by_soap": {}, **RATE},
        {"lookahead": {"sync_period": 2, "slow_step_size": 0.5}, "scale_by_adam": {}, **RATE},
        {"mechanize": {}, "scale_by_adam": {}, **RATE},
        {**RATE, "ema_of_params": {"decay": 0.9}},
        *({name: {"learning_rate": 1e-3}} for name in ("adamw", "lion", "rmsprop", "muon", "schedule_free_adamw")),
    ],
    ids=lambda tables: "-".join(tables),
)
def test_the_optimizer_is_float32_whatever_the_parameters_are(tables):
    """And its state keeps its dtypes, which a scan over steps and a checkpoint both want."""
    raw = resolved(model__param_dtype="bfloat16", data__micro_batches=2).to_dict()
    raw["optimizer"] = {"chain": tuple(tables), **tables}
    structure, hparams = step.split(config.resolve(config.ConfigDict(raw)))
    built = step.build(structure)
    before = jax.eval_shape(built.init, jax.random.key(0), hparams)
    after, _ = jax.eval_shape(built.train_step, hparams, before, batch())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(lambda x: (x.shape, x.dtype), after)
    assert {x.dtype for x in jax.tree.leaves(before.params)} == {jnp.dtype("bfloat16")}
    assert jnp.dtype("bfloat16") not in {x.dtype for x in jax.tree.leaves(before.opt_state)}


def test_parameters_in_bfloat16_leave_the_same_numbers_traced():
    raw = resolved(model__param_dtype="bfloat16").to_dict()
    raw["optimizer"] = {"chain": ("sgd",), "sgd": {"learning_rate": 1e-3, "momentum": 0.9}}
    _, hparams = step.split(config.resolve(config.ConfigDict(raw)))
    assert hparams.optimizer["sgd"].keys() == {"learning_rate", "momentum"}


@pytest.mark.parametrize("chunks", [0, 4])
def test_the_loss_by_chunks_is_the_loss(chunks):
    terms = {"loss__label_smoothing": 0.1, "loss__z_loss": 0.01}
    whole, hparams, state = program(**GRADIENTS, **terms)
    parts, _, _ = program(**GRADIENTS, **terms, model__loss_chunks=chunks)
    moved, metrics = whole.train_step(hparams, state, batch())
    other, others = parts.train_step(hparams, state, batch())
    for name, value in metrics.items():
        np.testing.assert_allclose(others[name], value, rtol=1e-5, err_msg=name)
    for one, two, before in zip(*map(jax.tree.leaves, (moved.params, other.params, state.params)), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5 * np.abs(one - before).max() + 1e-7)


def test_a_number_that_cannot_be_traced_stays_a_constant(tmp_path, monkeypatch):
    (tmp_path / "branching.py").write_text(
        "import optax\ndef double_if(x: float, y: float = 2.0):\n    return optax.scale(y if x > 0 else 1.0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    chain = ("branching:double_if", "scale_by_learning_rate")
    cfg = resolved(optimizer__chain=("mine", "scale_by_learning_rate"))
    raw = cfg.to_dict()
    raw["optimizer"]["mine"] = {"transform": chain[0], "x": 1.0, "y": 3.0}
    structure, hparams = step.split(config.resolve(config.ConfigDict(raw)))
    assert structure.optimizer.mine.x == 1.0
    assert hparams.optimizer["mine"] == {"y": np.float32(3.0)}


def test_a_python_number_in_a_state_compiles_no_second_step():
    ema = optax.GradientTransformation(
        lambda params: {"ema": 0.0}, lambda u, s, params=None: (u, {"ema": 0.9 * s["ema"] + 0.1 * optax.tree.norm(u)})
    )
    raw = resolved(optimizer__chain=("mine", "scale_by_learning_rate")).to_dict()
    raw["optimizer"]["mine"] = {"transform": ema}
    structure, hparams = step.split(config.resolve(config.ConfigDict(raw)))
    program = step.build(structure)
    before = jax.eval_shape(program.init, jax.random.key(0), hparams)
    after, _ = jax.eval_shape(program.train_step, hparams, before, batch())
    kinds = [[(x.dtype, x.weak_type) for x in jax.tree.leaves(state)] for state in (before, after)]
    assert kinds[0] == kinds[1]


def test_optax_takes_the_numbers_of_split_outside_of_jit_too():
    raw = resolved().to_dict()
    made = optax.inject_hyperparams(optax.adam)
    raw["optimizer"] = {"chain": ("it",), "it": {"transform": made, "learning_rate": 1e-3, "b1": 0.9}}
    structure, hparams = step.split(config.resolve(config.ConfigDict(raw)))
    program = step.build(structure)
    state = program.init(jax.random.key(0), hparams)
    assert float(state.opt_state[0].hyperparams["b1"]) == np.float32(0.9)
    before, (after, _) = state, jax.jit(program.train_step)(hparams, state, batch())
    assert jax.tree.structure(before) == jax.tree.structure(after)


def test_a_mask_that_matches_nothing_is_refused_before_anything_runs():
    cfg = resolved(optimizer__add_decayed_weights__where="kernal")
    with pytest.raises(ConfigError, match="matches no parameter"):
        step.split(cfg)


def test_a_group_that_is_left_alone_is_frozen():
    rest = {"rest": {"where": "rest", "chain": ()}, "thin": {"where": "^lora/", "chain": ("adam",)}}
    raw = resolved(model__lora__rank=2).to_dict()
    raw["optimizer"] = {"chain": ("partition",), "partition": rest, "adam": {"learning_rate": 1e-3}}
    assert not [line for line in sanity.check(config.resolve(config.ConfigDict(raw))) if "model.lora" in line]
    assert [line for line in sanity.check(resolved(model__lora__rank=2)) if "model.lora" in line]


def test_a_function_that_was_loaded_again_is_traced_again(tmp_path, monkeypatch):
    """In a notebook: its module's code is another, and the config still says its name."""
    file = tmp_path / "jaxlm_test_reloaded.py"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    raw = resolved().to_dict()
    chain = ("mine", "scale_by_learning_rate")
    raw["optimizer"] = {"chain": chain, "mine": {"transform": "jaxlm_test_reloaded:mine"}, **RATE}
    cfg = config.resolve(config.ConfigDict(raw))
    kept = []
    for factor in (1.0, 1.0, 0.0):
        file.write_text(f"import optax\ndef mine():\n    return optax.scale({factor})\n")
        importlib.reload(importlib.import_module("jaxlm_test_reloaded"))
        kept.append(steps.build(cfg))
    assert kept[0] is kept[1] is not kept[2]
