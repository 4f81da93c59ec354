"""Every transform of optax, optax.contrib and jaxlm that can train a network, as a stage of a chain.

On a small GPT-2 over 10 steps: the same bits as the optax chain written by hand, when that is given the same traced
numbers, and 1e-5 where it is given constants (1 - b2 is rounded differently then); the loss falls; lanes are the solo
runs; and the state survives a checkpoint. What looks at a matrix as a whole (`layerwise`) is by hand given the matrices
of each layer as parameters of their own; then sums are rounded differently.
"""

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from jaxlm import config, tree
from jaxlm.lookup import _functions
from jaxlm.model import gpt2, losses
from jaxlm.optim import chain, layerwise, review, transforms
from jaxlm.optim.static import static_arguments
from jaxlm.training.checkpoint import Checkpoints
from jaxlm.training.step import State
from tests.runs import THOROUGH
from tests.tiny import assert_same_bits, batch, resolved

pytestmark = pytest.mark.slow

STEPS = 10
T = 8


class Case(NamedTuple):
    arguments: dict[str, Any] = {}
    rate: float | None = None  # of a `scale_by_learning_rate` after it; None: it needs none
    lanes: float = 1e-4  # how near the lanes are to their solo runs, relative to the norm
    emitters: bool = False  # whether by hand it is rounded alike only by the emitters that `compile_quickly` leaves out


def own(learning_rate, **arguments):
    return Case({"learning_rate": learning_rate, **arguments})


def is_optaxs_of_a_stage(alias):
    """Whether it is one such as adam: scale_by_adam, which trains here, and what other aliases have too."""
    module, dot, name = alias.rpartition(".")
    return f"{module}{dot}scale_by_{name}" in STAGES and not hasattr(transforms, name)


ALIASES = {
    "adabelief": own(1e-2),
    "adadelta": own(10.0),
    "adafactor": own(1e-2, min_dim_size_to_factor=8),
    "adagrad": own(1e-1),
    "adam": own(1e-2, b1=0.9, b2=0.95),
    "adamax": own(1e-2),
    "adamaxw": own(1e-2, weight_decay=0.1),
    "adamw": own(1e-2, b1=0.9, b2=0.95, weight_decay=0.1),
    "adan": own(1e-2, weight_decay=0.1),
    "amsgrad": own(1e-2),
    "fromage": own(1e-2),
    "lamb": own(1e-2, weight_decay=0.1),
    "lars": own(10.0, weight_decay=0.1),
    "lbfgs": Case({"memory_size": 3}),
    "lion": own(1e-3, weight_decay=0.1),
    "nadam": own(1e-2),
    "nadamw": own(1e-2, weight_decay=0.1),
    "noisy_sgd": own(0.5, eta=1e-4, gamma=0.55, key=0),
    "novograd": own(1e-2),
    "optimistic_adam_v2": own(1e-2),
    "optimistic_gradient_descent": own(0.5),
    "polyak_sgd": Case({"max_learning_rate": 1.0, "scaling": 0.5}),
    "radam": own(1e-2),
    "rmsprop": own(1e-2, decay=0.9, momentum=0.5),
    "rprop": own(1e-3),
    "sgd": own(0.5, momentum=0.9, nesterov=True),
    "sign_sgd": own(1e-3),
    "signum": own(1e-3),
    "sm3": own(1e-1),
    "yogi": own(1e-2),
    "contrib.acprop": own(1e-2, eps=1e-2),
    "contrib.ademamix": own(1e-2),
    "contrib.adopt": own(1e-2),
    "contrib.cocob": Case(),
    "contrib.dadapt_adamw": Case(),
    "contrib.dog": Case(),
    "contrib.dowg": Case(),
    "contrib.madgrad": own(1e-2),
    "contrib.momo": Case(),
    "contrib.momo_adam": own(1e-2),
    "contrib.prodigy": Case(),
    "contrib.schedule_free_adamw": own(1e-2),
    "contrib.schedule_free_sgd": own(1.0),
    "contrib.simplified_ademamix": own(1e-3),
    "contrib.sophia": own(1e-3),
    "muon": own(1e-2)._replace(emitters=True),
}

STAGES = {
    "adaptive_grad_clip": Case({"clipping": 0.5}, 0.5),
    "add_decayed_weights": Case({"weight_decay": 0.1, "where": "kernels"}, 0.5),
    "add_noise": Case({"eta": 1e-4, "gamma": 0.55, "key": 0}, 0.5),
    "apply_every": Case({"k": 2}, 0.5),
    "cautious": Case({}, 0.5),
    "centralize": Case({}, 0.5),
    "clip": Case({"max_delta": 0.1}, 0.5),
    "clip_by_block_rms": Case({"threshold": 0.1}, 0.5),
    "clip_by_global_norm": Case({"max_norm": 1.0}, 0.5),
    "ema": Case({"decay": 0.5}, 0.5),
    "normalize_by_update_norm": Case({}, 0.5),
    "scale": Case({"step_size": 2.0}, 0.1),
    "scale_by_adadelta": Case({}, 10.0),
    "scale_by_adam": Case({"b1": 0.9, "b2": 0.95}, 1e-2),
    "scale_by_adamax": Case({}, 1e-2),
    "scale_by_adan": Case({}, 1e-2),
    "scale_by_amsgrad": Case({}, 1e-2),
    "scale_by_belief": Case({}, 1e-2),
    "scale_by_distance_over_gradients": Case({}, 1.0),
    "scale_by_factored_rms": Case({"min_dim_size_to_factor": 8}, 1e-2),
    "scale_by_layer": Case({"decay": 0.9}, 0.5),
    "scale_by_lbfgs": Case({"memory_size": 3}, 0.1),
    "scale_by_lion": Case({}, 1e-3),
    "scale_by_muon": Case({"where": "kernels"}, 1e-2, emitters=True),
    "scale_by_novograd": Case({}, 1e-2),
    "scale_by_optimistic_gradient": Case({}, 0.5),
    "scale_by_param_block_norm": Case({}, 1e-2),
    "scale_by_param_block_rms": Case({}, 0.5),
    "scale_by_polyak": Case({}, 0.5),
    "scale_by_radam": Case({}, 1e-2),
    "scale_by_rms": Case({"decay": 0.9}, 1e-2),
    "scale_by_rprop": Case({"learning_rate": 1e-3}, 1.0),
    "scale_by_rss": Case({}, 1e-1),
    "scale_by_shampoo": Case({"matrix_eps": 1e-2}, 1e-2, lanes=1e-3, emitters=True),
    "scale_by_sign": Case({}, 1e-3),
    "scale_by_sm3": Case({}, 1e-1),
    "scale_by_soap": Case({}, 1e-2),
    "scale_by_stddev": Case({}, 1e-2),
    "scale_by_trust_ratio": Case({}, 0.1),
    "scale_by_yogi": Case({}, 1e-2),
    "trace": Case({"decay": 0.9}, 0.1),
    "zero_nans": Case({}, 0.5),
    "contrib.normalize": Case({}, 0.5),
    "contrib.reduce_on_plateau": Case({"patience": 2}, 0.5),
    "contrib.scale_by_acprop": Case({"eps": 1e-2}, 1e-2),
    "contrib.scale_by_ademamix": Case({}, 1e-2),
    "contrib.scale_by_adopt": Case({}, 1e-2),
    "contrib.scale_by_cocob": Case(),
    "contrib.scale_by_madgrad": Case({"learning_rate": 1e-2}),
    "contrib.scale_by_simplified_ademamix": Case({}, 1e-3),
}

WRAPPERS = {
    "freeze": Case({"where": "embeddings"}),
    "lookahead": Case({"sync_period": 3}),
    "mechanize": Case(),
    "sam": Case(lanes=2e-3),  # a second gradient, and Adam of it
    "schedule_free": Case(),
    "skip_nonfinite": Case(),
    "skip_spikes": Case({"window": 4, "z": 2.0}, emitters=True),
    "train_last_layers": Case({"count": 1}),
}

LAST = {
    "ema_of_params": Case({"decay": 0.5}),
    "proximal_l1": Case({"l1": 1e-3}),  # takes the chain's learning rate
}

KINDS = (ALIASES, STAGES, WRAPPERS, LAST)
ALL = [(name, case) for kind in KINDS for name, case in kind.items()]
TRAINED = [(name, case) for name, case in ALL if THOROUGH or not (name in ALIASES and is_optaxs_of_a_stage(name))]

NOT_STAGES = {
    # jaxlm has one of its own under the same name, or says what is meant in another way
    *("scale_by_learning_rate", "scale_by_schedule", "lookahead", "partition", "multi_transform", "masked", "freeze"),
    *("apply_if_finite", "skip_not_finite", "skip_large_updates", "conditionally_mask", "conditionally_transform"),
    *("selective_transform", "chain", "named_chain", "inject_hyperparams", "inject_stateful_hyperparams", "flatten"),
    *("contrib.muon", "contrib.scale_by_muon", "contrib.mechanize", "contrib.sam", "contrib.schedule_free"),
    # want another kind of gradient: one for each example, or complex numbers
    *("per_example_global_norm_clip", "per_example_layer_norm_clip", "contrib.dpsgd", "microbatch"),
    *("contrib.differentially_private_aggregate", "contrib.split_real_and_imaginary"),
    # projects what has rank 2: of stacked layers the biases, not the kernels
    *("contrib.galore", "contrib.scale_by_galore"),
    # deprecated in optax
    "optimistic_adam",
    # parts of others, measurements, and what makes no transform
    *("scale_by_backtracking_linesearch", "scale_by_zoom_linesearch", "contrib.hutchinson_estimator_diag_hessian"),
    *("contrib.schedule_free_eval_params", "measure_with_ema", "monitor", "snapshot", "identity", "set_to_zero"),
    *("stateless", "stateless_with_tree_map", "with_extra_args_support", "keep_params_nonnegative"),
}


CFG = resolved(model__context_length=T, optimizer__chain="scale_by_learning_rate")
MODEL = gpt2.build(CFG.model)
BATCH = batch(rows=4, length=T)


def objective(params):
    sums = losses.token_sums(MODEL.apply(params, BATCH), BATCH["targets"], BATCH["weights"])
    return sums.objective / sums.weight


@pytest.fixture(scope="module")
def start():
    return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def gradient():
    """params -> (loss, gradients), those of the keys' biases exactly zero: in theory they are, and Adam would blow up
    what rounding makes of them."""

    def value_and_grad(params):
        value, grads = jax.value_and_grad(objective)(params)
        width = CFG.model.embed_dim
        bias = grads["h"]["attn"]["c_attn"]["bias"]
        grads["h"]["attn"]["c_attn"]["bias"] = bias.at[:, width : 2 * width].set(0.0)
        return value, grads

    return jax.jit(value_and_grad)


def assert_near(a, b, tolerance):
    """Relative to the norm, parameter by parameter."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y) + 1e-9


def spec_of(name, case):
    table = {"it": {"transform": name, **case.arguments}}
    rate = {"rate": {"transform": "scale_by_learning_rate", "peak": case.rate or 1e-2}}
    if name in ALIASES:
        return {"chain": ("it",), **table}
    if name in STAGES:
        return {"chain": ("it", "rate"), **table, **rate} if case.rate else {"chain": ("it",), **table}
    order = ("scale_by_adam", "rate", "it") if name in LAST else ("it", "scale_by_adam", "rate")
    return {"chain": order, **table, **rate}


@pytest.mark.parametrize(("name", "case"), ALL)
def test_no_transform_is_doubted_that_is_used_as_it_is_meant(name, case):
    decay = "decay of biases or norms"  # which some do by default
    assert {finding.rule for finding in review.check(spec_of(name, case))} <= {decay}


def by_hand(name, case, numbers):
    """The optax chain as one writes it, of the numbers in `numbers` and all else as it stands in the case."""
    if name.startswith("contrib."):
        function = getattr(optax.contrib, name.removeprefix("contrib."))
    else:
        function = getattr(transforms, name, None) or getattr(optax, name)
    arguments = {**case.arguments, **numbers.get("it", {})}
    rate = optax.scale_by_learning_rate(numbers["rate"]["peak"]) if "rate" in numbers else None
    if name in ALIASES:
        return function(**arguments)
    if name in STAGES:
        where = arguments.pop("where", None)
        transform = function(**arguments)
        if where == "kernels":
            transform = optax.masked(transform, KERNELS)
        return optax.chain(transform, rate) if rate else transform
    if name in LAST:
        if name == "proximal_l1":
            arguments["learning_rate"] = numbers["rate"]["peak"]
        return optax.chain(optax.scale_by_adam(), rate, function(**arguments))
    if name == "schedule_free":
        arguments["learning_rate"] = numbers["rate"]["peak"]
    return function(optax.chain(optax.scale_by_adam(), rate), **arguments)


def of_single_layers(transform):
    """A transform whose parameters are those of each layer by themselves: no leaf is stacked."""
    transform = optax.with_extra_args_support(transform)

    def apart(x):
        layers = tree.num_layers(x)
        return x | {"h": [jax.tree.map(lambda leaf, i=i: leaf[i], x["h"]) for i in range(layers)]}

    def update(updates, state, params, **extra):
        updates, state = transform.update(apart(updates), state, apart(params), **extra)
        return updates | {"h": jax.tree.map(lambda *leaves: jnp.stack(leaves), *updates["h"])}, state

    return optax.GradientTransformationExtraArgs(lambda params: transform.init(apart(params)), update)


def sees_matrices(name):
    return getattr(optax, name, None) in layerwise.OF_A_MATRIX


def KERNELS(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def split(spec, params):
    cfg = config.default()
    with cfg.unlocked(), cfg.ignore_type():
        cfg.optimizer = spec
    cfg = config.resolve(cfg)
    static = static_arguments(cfg.optimizer.to_dict(), params, STEPS)
    structure, hparams = config.split(cfg, static)
    constants = {stage: {key: spec[stage][key] for key in table} for stage, table in hparams.optimizer.items()}
    return structure.optimizer.to_dict(), hparams.optimizer, constants


def follow(init, update, numbers, start, gradient):
    """Parameters, states and losses, by side, after 10 steps."""
    states = init(numbers, start)
    params = dict.fromkeys(states, start)
    found = {side: [] for side in states}
    for _ in range(STEPS):
        pairs = {side: gradient(params[side]) for side in states}
        for side, (value, _) in pairs.items():
            found[side].append(float(value))
        params, states = update(numbers, pairs, states, params)
    for side in states:
        found[side].append(float(gradient(params[side])[0]))
    return params, states, found


@pytest.mark.parametrize(("name", "case"), TRAINED, ids=[name for name, _ in TRAINED])
def test_a_transform_as_a_stage(name, case, start, gradient, tmp_path):
    structure, numbers, constants = split(spec_of(name, case), start)
    single = of_single_layers if sees_matrices(name) else optax.with_extra_args_support
    makers = {
        "ours": lambda numbers: chain.build(structure, numbers, STEPS),
        "hand": lambda numbers: single(by_hand(name, case, numbers)),
    }
    if numbers:
        makers["constants"] = lambda _: single(by_hand(name, case, constants))

    @jax.jit
    def init(numbers, params):
        return {side: make(numbers).init(params) for side, make in makers.items()}

    emitters = case.emitters and "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", "")

    @functools.partial(jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": True} if emitters else None)
    def update(numbers, pairs, states, params):
        out = {}, {}
        for side, make in makers.items():
            value, grads = pairs[side]
            args = (grads, states[side], params[side], objective, value)
            updates, out[1][side] = chain.update(make(numbers), *args)
            out[0][side] = optax.apply_updates(params[side], updates)
        return out

    params, states, found = follow(init, update, numbers, start, gradient)
    if sees_matrices(name):
        assert_near(params["ours"], params["hand"], 1e-5)
    else:
        assert_same_bits(params["ours"], params["hand"])
    if numbers:
        assert_near(params["ours"], params["constants"], 1e-5)
    assert np.isfinite(found["ours"]).all() and found["ours"][-1] < found["ours"][0]

    # lanes: as it is, and with all numbers 20% lower
    lower = jax.tree.map(lambda x: np.float32(0.8 * x), numbers)
    solo = [params, follow(init, update, lower, start, gradient)[0] if numbers else params]
    stacked = jax.tree.map(lambda a, b: np.stack([a, b]), numbers, lower)
    lanes = jax.tree.map(lambda x: jnp.stack([x, x]), start)
    state = jax.jit(jax.vmap(lambda numbers, params: makers["ours"](numbers).init(params)))(stacked, lanes)

    @jax.jit
    @jax.vmap
    def update_lanes(numbers, value, grads, state, params):
        updates, state = chain.update(makers["ours"](numbers), grads, state, params, objective, value)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        parts = [gradient(jax.tree.map(lambda x, i=i: x[i], lanes)) for i in range(2)]
        value, grads = jax.tree.map(lambda a, b: jnp.stack([a, b]), *parts)
        lanes, state = update_lanes(stacked, value, grads, state, lanes)
    for i in range(2):
        assert_near(jax.tree.map(lambda x, i=i: x[i], lanes), solo[i]["ours"], case.lanes)

    saved = State(jnp.int32(STEPS), params["ours"], states["ours"], jax.random.key(0))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(saved, {}, CFG, {})
        checkpoints.wait()
        assert_same_bits(checkpoints.restore(saved, STEPS).state, saved)


def test_every_transform_that_optax_has_is_listed():
    """A new one in optax must find its place here: a stage, or a reason why not."""
    makers = {name for name in _functions(optax) if _makes_a_transform(optax, name)}
    makers |= {f"contrib.{name}" for name in _functions(optax.contrib) if _makes_a_transform(optax.contrib, name)}
    assert makers - {*ALIASES, *STAGES, *NOT_STAGES} == set()
    ours = {name for name in _functions(transforms)} - {"learning_rate", "scale_by_learning_rate"}
    assert ours - {*ALIASES, *STAGES, *WRAPPERS, *LAST} == set()


def _makes_a_transform(module, name):
    function = getattr(module, name)
    returned = getattr(getattr(function, "func", function), "__annotations__", {}).get("return", "")
    return "GradientTransformation" in str(returned)
