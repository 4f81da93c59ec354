"""Wrappers: transforms with a first argument `inner`, which in a chain is all of the stages that come after them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.typing import ArrayLike

from jaxlm import tree
from jaxlm.errors import ConfigError
from jaxlm.optim.parts import filled, part_of

PyTree = Any


class LookaheadState(NamedTuple):
    """One number per parameter, and the inner state."""

    step: jax.Array  # int32[]: steps so far
    slow: PyTree
    inner_state: optax.OptState


def lookahead(
    inner: optax.GradientTransformation, sync_period: int = 5, slow_step_size: ArrayLike = 0.5
) -> optax.GradientTransformationExtraArgs:
    """Lookahead (Zhang et al. 2019, arXiv:1907.08610): k steps forward, 1 step back.

        p = p + inner's update;  each sync_period steps: slow = slow + slow_step_size (p - slow), p = slow

    The parameters are the fast ones; at each multiple of `sync_period` they are the slow ones too. The inner state
    goes on at a sync. (optax's wants parameters that are pairs.)
    """
    if sync_period < 1:
        raise ConfigError(f"lookahead: sync_period={sync_period}, but it counts steps: 1 or more")
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> LookaheadState:
        return LookaheadState(jnp.zeros([], jnp.int32), _copied(params), inner.init(params))

    def update(updates: PyTree, state: LookaheadState, params: PyTree, **extra: Any) -> tuple[PyTree, LookaheadState]:
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra)
        count = optax.safe_increment(state.step)
        fast = optax.apply_updates(params, updates)
        moved = jax.tree.map(lambda s, f: s + (slow_step_size * (f - s)).astype(s.dtype), state.slow, fast)
        sync = count % sync_period == 0
        updates = optax.tree.where(sync, jax.tree.map(jnp.subtract, moved, params), updates)
        return updates, LookaheadState(count, optax.tree.where(sync, moved, state.slow), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


class SkipNonfiniteState(NamedTuple):
    """No number per parameter but the inner state's."""

    skipped: jax.Array  # int32[]: steps that changed nothing
    inner_state: optax.OptState


def skip_nonfinite(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Where any number of the gradient, or of inner's update, is NaN or infinite, the step changes nothing but a count.

    Neither parameters nor inner's state change. `optax.apply_if_finite` gives in after a number of such steps; this
    never does: watch `skipped`. (In a run such a step is `optim/skipped`, and its step by itself leaves out what is not
    finite: this holds back what only a part of the chain makes so.)
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> SkipNonfiniteState:
        return SkipNonfiniteState(jnp.zeros([], jnp.int32), inner.init(params))

    def update(
        updates: PyTree, state: SkipNonfiniteState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, SkipNonfiniteState]:
        out, inner_state = inner.update(updates, state.inner_state, params, **extra)
        finite = _finite(updates) & _finite(out)
        held = (jax.tree.map(jnp.zeros_like, out), state.inner_state)
        out, inner_state = optax.tree.where(finite, (out, inner_state), held)
        return out, SkipNonfiniteState(state.skipped + ~finite, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def held_back(before: optax.OptState, after: optax.OptState) -> jax.Array:
    """bool[]: whether any `skip_nonfinite` in an optimizer held an update back between these two states of it."""
    kind, none = SkipNonfiniteState, jnp.int32(0)
    counts = [sum((state.skipped for state in _states(root, kind)), none) for root in (before, after)]
    return counts[1] > counts[0]


class SkipSpikesState(NamedTuple):
    """`window` numbers and the inner state's."""

    losses: jax.Array  # float32[window]: a ring of the accepted ones
    accepted: jax.Array  # int32[]: since the window was last empty
    in_a_row: jax.Array  # int32[]: steps skipped right before this one
    skipped: jax.Array  # int32[]: steps that changed nothing
    inner_state: optax.OptState


def skip_spikes(
    inner: optax.GradientTransformation, window: int = 100, z: ArrayLike = 6.0
) -> optax.GradientTransformationExtraArgs:
    """Where the loss is far above the last ones, the step changes nothing but counts: neither parameters nor inner.

        skip where value > m + z s,  m and s the mean and the standard deviation (over n) of the last n = window losses

    The z-score rule. Only accepted losses are in the window, and until it is full all are accepted. A loss that is not
    finite is skipped at any time. The window-th skip in a row is taken for a change of regime: it empties the window,
    which then fills with what comes.

    It holds back batches that are bad, not what an update did before: PaLM (arXiv:2204.02311, 5.1) goes back to a
    checkpoint for that, and leaves the batches out. ZClip (arXiv:2504.02507) clips by the z-score of gradient norms.

    Args:
      window: at least 2.
    """
    if window < 2:
        raise ConfigError(f"skip_spikes: window={window}, but a deviation takes losses: 2 or more")
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> SkipSpikesState:
        zeros = jnp.zeros(3, jnp.int32)  # of which each count is a copy: the same buffer thrice can't be donated
        return SkipSpikesState(jnp.zeros(window, jnp.float32), zeros[0], zeros[1], zeros[2], inner.init(params))

    def update(
        updates: PyTree, state: SkipSpikesState, params: PyTree | None = None, *, value: jax.Array, **extra: Any
    ) -> tuple[PyTree, SkipSpikesState]:
        out, inner_state = inner.update(updates, state.inner_state, params, value=value, **extra)
        losses, accepted = state.losses, state.accepted
        spike = (accepted >= window) & (value > losses.mean() + z * losses.std())
        skip = spike | ~jnp.isfinite(value)
        in_a_row = jnp.where(skip, (state.in_a_row + 1) % window, 0)
        held = (jax.tree.map(jnp.zeros_like, out), losses, state.inner_state)
        moved = (out, losses.at[accepted % window].set(value), inner_state)
        out, losses, inner_state = optax.tree.where(skip, held, moved)
        accepted = jnp.where(skip & (in_a_row == 0), 0, accepted + ~skip)
        return out, SkipSpikesState(losses, accepted, in_a_row, state.skipped + skip, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def schedule_free(
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.Array | float = 0.9,
    weight_lr_power: ArrayLike = 2.0,
) -> optax.GradientTransformationExtraArgs:
    """Schedule-free averaging (Defazio et al. 2024, arXiv:2405.15682): `optax.contrib.schedule_free` around a chain.

        z = z + inner's update at y;  x = (1 - c) x + c z;  y = b1 x + (1 - b1) z
        c = the step's share in the sum of max(learning_rate so far) ^ weight_lr_power

    The parameters are y, where gradients are taken; x is what to evaluate, see `evaluation_params`. `inner` has no
    momentum (Adam with b1 = 0, or scale_by_rms) and ends with the same learning rate, with warmup but no decay. One
    number per parameter, and the inner state.

    Args:
      b1: above 0: with 0 there is no x in y, where it is read from.
    """
    if not isinstance(b1, jax.core.Tracer) and not 0 < b1 <= 1:
        raise ConfigError(f"schedule_free: b1={b1}; expected above 0, such as 0.9, and 1 at most")
    rate: Any = learning_rate
    if callable(learning_rate):  # optax counts from 1 here, and inner's schedule from 0
        rate = lambda count: learning_rate(count - 1)  # noqa: E731
    return optax.contrib.schedule_free(inner, rate, b1, weight_lr_power)


def mechanize(
    inner: optax.GradientTransformation,
    weight_decay: ArrayLike = 1e-2,
    eps: ArrayLike = 1e-8,
    s_init: ArrayLike = 1e-6,
    num_betas: int = 6,
) -> optax.GradientTransformationExtraArgs:
    """Mechanic (Cutkosky et al. 2023, arXiv:2306.00144): `optax.contrib.mechanize` around a chain.

        p = p_0 + s Δ, with Δ the sum of inner's updates, and s > 0 learned: a step size that no one has to tune

    `inner` keeps its schedule, with a peak of 1. One number per parameter (p_0), and the inner state.
    """
    mechanic = optax.contrib.mechanize(inner, weight_decay, eps, s_init, num_betas)
    return optax.GradientTransformationExtraArgs(lambda params: mechanic.init(_copied(params)), mechanic.update)


def sam(inner: optax.GradientTransformation, rho: ArrayLike = 0.05) -> optax.GradientTransformationExtraArgs:
    """Sharpness-aware minimisation (Foret et al. 2020, arXiv:2010.01412).

        g = ∇f(p);  inner is given ∇f(p + rho g / |g|), of the same batch, at p

    Takes a second gradient each step, of the extra argument `value_fn`: stages before this one shape only the
    direction of the perturbation, so clip after it. No state but inner's. (optax's `sam` takes turns, with the
    perturbed parameters in between for all to see, or wants a `grad_fn`; and it hands no extra arguments on.)
    """
    inner = optax.with_extra_args_support(inner)

    def update(
        updates: PyTree,
        state: optax.OptState,
        params: PyTree,
        *,
        value_fn: Callable[[PyTree], jax.Array],
        **extra: Any,
    ) -> tuple[PyTree, optax.OptState]:
        scale = rho / (tree.norm(updates) + 1e-12)
        perturbed = jax.tree.map(lambda p, g: p + (scale * g).astype(p.dtype), params, updates)
        gradient = jax.grad(value_fn)(perturbed)
        return inner.update(gradient, state, params, value_fn=value_fn, **{**extra, "grad": gradient})

    return optax.GradientTransformationExtraArgs(inner.init, update)


class EmaOfParamsState(NamedTuple):
    """One number per parameter. `average` is ready for use at any step: it starts as the initial parameters."""

    step: jax.Array  # int32[]: steps so far
    average: PyTree  # float32


def ema_of_params(decay: ArrayLike = 0.999, debias: bool = True) -> optax.GradientTransformation:
    """A moving average of the new parameters beside them, see `evaluation_params`; updates pass unchanged.

        average = average + w (p + u - average),  w = 1 - decay, or with debias (1 - decay) / (1 - decayᵗ)

    (Polyak and Juditsky 1992, with exponential weights; debias as in Adam, arXiv:1412.6980: the weights of the
    parameters after steps 1 to t sum to 1, and those at the start have none.) Comes last in a chain, since it must
    see the update as it is applied.
    """

    def init(params: PyTree) -> EmaOfParamsState:
        average = jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)  # in bfloat16 small weights change nothing
        return EmaOfParamsState(jnp.zeros([], jnp.int32), average)

    def update(updates: PyTree, state: EmaOfParamsState, params: PyTree) -> tuple[PyTree, EmaOfParamsState]:
        count = optax.safe_increment(state.step)
        weight = jnp.float32((1 - decay) / (1 - decay**count) if debias else 1 - decay)  # under jax_enable_x64 too
        new = optax.apply_updates(params, updates)
        return updates, EmaOfParamsState(count, jax.tree.map(lambda a, p: a + weight * (p - a), state.average, new))

    return optax.GradientTransformation(init, update)


_AVERAGES = {"": optax.contrib.ScheduleFreeState, "ema": EmaOfParamsState}
"""By the name of `evaluation_params`, what keeps another than the parameters."""


def evaluation_params(opt_state: optax.OptState, params: PyTree) -> dict[str, PyTree]:
    """What to evaluate, by the name to report it under: "" for what the optimizer means as its result, and more.

    "" is schedule-free's average x where there is one, else `params`; "ema" is the average of `ema_of_params`. Both
    are found at any depth of the state; what they don't cover, since they see a part only, is as in `params`.
    """
    out = {"": params}
    for state in _states(opt_state, optax.contrib.ScheduleFreeState):
        y, b1 = part_of(params, state.z), state.b1
        x = jax.tree.map(lambda y, z, b1=b1: (y - (1 - b1) * z) / b1, y, state.z)
        out[""] = filled(x, out[""])
    for state in _states(opt_state, EmaOfParamsState):
        out["ema"] = filled(state.average, out.get("ema", out[""]))
    return out


def averages(opt_state: optax.OptState) -> set[str]:
    """The names under which `evaluation_params` finds an average in a state; under "" it else has the parameters."""
    return {name for name, kind in _AVERAGES.items() if _states(opt_state, kind)}


def of_stored(state: PyTree) -> optax.OptState:
    """An optimizer state from the plain dicts and lists that a file has of it, as far as `evaluation_params` looks:
    with the states that keep an average, known by their fields, and what is masked, None there."""
    if isinstance(state, Mapping):
        fields = {name: of_stored(value) for name, value in state.items()}
        kind: Any = next((kind for kind in _AVERAGES.values() if fields.keys() == {*kind._fields}), dict)
        return kind(**fields)
    if isinstance(state, (list, tuple)):
        return [of_stored(value) for value in state]
    return optax.MaskedNode() if state is None else state


def _states(root: optax.OptState, kind: type) -> list[Any]:
    """All states of a kind at any depth, the outer ones before those inside of them."""
    nodes = jax.tree.leaves(root, is_leaf=lambda node: isinstance(node, kind))
    found: list[Any] = [node for node in nodes if isinstance(node, kind)]
    return [state for outer in found for state in (outer, *_states(tuple(outer), kind))]


def _finite(updates: PyTree) -> jax.Array:
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(updates)]))


def _copied(params: PyTree) -> PyTree:
    """Buffers of their own: the same buffer twice can't be donated."""
    return jax.tree.map(jnp.copy, params)
