"""Kronecker-factored preconditioners: Shampoo, and SOAP, which is Adam in Shampoo's eigenbasis.

For a matrix with gradient G both keep moving averages of G Gᵀ (the left side) and Gᵀ G (the right side). By path,
kernels and embeddings are matrices: their last two axes, so that of [L, in, out] each layer has factors of its own.
A side longer than `max_precond_dim` (an embedding's vocabulary) keeps no factor and is the identity; norms and biases
have no sides and are Adam's. c_attn is one matrix [D, 3D], as in the reference implementations.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxlm import tree
from jaxlm.errors import ConfigError

PyTree = Any
Sides = dict[str, jax.Array]
"""{"left": [..., m, m], "right": [..., n, n]} of a leaf [..., m, n], without the sides that have no factor."""

MATRICES = re.compile(f"{tree.GROUPS['kernels']}|{tree.GROUPS['embeddings']}")
AXES = {"left": -2, "right": -1}
TINY = 1e-30  # 0 / 0 is 0


class KroneckerState(NamedTuple):
    """All float32. Per parameter of a matrix [m, n]: 2 moments, and 2 (m/n + n/m) for its two sides."""

    step: jax.Array  # int32[]: updates so far
    mu: PyTree  # average of the gradients
    nu: PyTree  # average of their squares; SOAP's in the eigenbasis
    factors: PyTree  # Sides of each leaf: averages of G Gᵀ and Gᵀ G
    bases: PyTree  # like `factors`. SOAP: their eigenvectors, as columns; Shampoo: their inverse roots


def scale_by_soap(
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10_000,
) -> optax.GradientTransformation:
    """SOAP (Vyas et al. 2024, arXiv:2409.11321): Adam in the eigenbasis of Shampoo's factors.

        L = b2 L + (1 - b2) G Gᵀ,  R = b2 R + (1 - b2) Gᵀ G,  their eigenvectors Q_L, Q_R
        M = b1 M + (1 - b1) G,  V = b2 V + (1 - b2) (Q_Lᵀ G Q_R)²
        u = Q_L [(Q_Lᵀ M Q_R) / (1 - b1ᵗ) / (sqrt(V / (1 - b2ᵗ)) + eps)] Q_Rᵀ

    As in the authors' code (github.com/nikhilvyas/SOAP) the first update is zero and only starts L, R and, by eigh,
    Q_L and Q_R, so that no gradient is seen in a basis of its own; then each `precondition_frequency` steps Q becomes
    the QR of L Q, one step of power iteration, with columns (and V) sorted by eigenvalue. `eps` is added as in
    optax's Adam, after the bias correction: with no sides this is Adam, one step late.

    L and R of one gradient are nearly singular, and where eigenvalues are alike, rounding picks the eigenvectors. So
    losses depend a little on how a batch is divided over micro-batches and devices (4e-4 after five steps of a model of
    width 32, where Adam's differ by 2e-6 and Shampoo's by 3e-5).

    Args:
      max_precond_dim: longer sides are the identity. A vocabulary V below it has a left side of V² numbers.
    """
    _check_frequency(precondition_frequency)

    def update(updates: PyTree, state: KroneckerState, params: PyTree | None = None) -> tuple[PyTree, KroneckerState]:
        del params
        count, gradients = state.step, tree.float32(updates)
        started = count > 0

        def average(decay: ArrayLike, old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(started, decay * old + (1 - decay) * new, old)

        def step(m: jax.Array, v: jax.Array, basis: Sides) -> jax.Array:
            m_hat, v_hat = (x / (1 - b ** jnp.maximum(count, 1)) for x, b in ((m, b1), (v, b2)))
            u = _multiply(_into(m_hat, basis) / (jnp.sqrt(v_hat) + eps), basis)
            return jnp.where(started, u, 0)

        with jax.default_matmul_precision("highest"):  # else GPUs round to 10 bits, which drowns small eigenvalues
            mu = jax.tree.map(lambda m, g: average(b1, m, g), state.mu, gradients)
            nu = jax.tree.map(lambda v, g, q: average(b2, v, _into(g, q) ** 2), state.nu, gradients, state.bases)
            out = jax.tree.map(step, mu, nu, state.bases)
            factors = _accumulate(state.factors, gradients, b2)
            bases = _when(count == 0, lambda: jax.tree.map(lambda f: _one_by_one(_eigh, f)[1], factors), state.bases)
            due = started & (count % precondition_frequency == 0)
            bases, nu = _when(due, lambda: _power_iteration(factors, bases, nu), (bases, nu))
        return _like(out, updates), KroneckerState(optax.safe_increment(count), mu, nu, factors, bases)

    return optax.GradientTransformation(_init(max_precond_dim), update)


def scale_by_shampoo(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    matrix_eps: ArrayLike = 1e-6,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10_000,
) -> optax.GradientTransformation:
    """Shampoo (Gupta et al. 2018, arXiv:1802.09568) with Adam's step sizes.

        L = b2 L + (1 - b2) G Gᵀ,  R = b2 R + (1 - b2) Gᵀ G,  M = b1 M + (1 - b1) G
        S = L^(-1/4) M R^(-1/4);  one side only: L^(-1/2) M
        u = S |A| / |S|, A = Adam's update of the same matrix

    Moving averages and momentum as in Shi et al. 2023, arXiv:2309.06497; the norm taken from Adam (grafting, Agarwal
    et al. 2020, arXiv:2002.11803) per layer, which makes their bias corrections cancel. The roots are computed by
    eigh at the first step and every `precondition_frequency` steps, of L + matrix_eps λ_max(L) I (Anil et al. 2020,
    arXiv:2002.09018). One machine's algorithm: no blocks of large matrices, no roots shared out over devices.

    Args:
      max_precond_dim: longer sides are the identity.
    """
    _check_frequency(precondition_frequency)

    def update(updates: PyTree, state: KroneckerState, params: PyTree | None = None) -> tuple[PyTree, KroneckerState]:
        del params
        count, gradients = optax.safe_increment(state.step), tree.float32(updates)

        def step(m: jax.Array, v: jax.Array, root: Sides) -> jax.Array:
            m_hat, v_hat = (x / (1 - b**count) for x, b in ((m, b1), (v, b2)))
            adam = m_hat / (jnp.sqrt(v_hat) + eps)
            if not root:
                return adam
            direction = _multiply(m, root)
            return direction * (_norm(adam) / (_norm(direction) + TINY))

        with jax.default_matmul_precision("highest"):
            mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, gradients)
            nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, state.nu, gradients)
            factors = _accumulate(state.factors, gradients, b2)
            due = state.step % precondition_frequency == 0
            roots = _when(due, lambda: _inverse_roots(mu, factors, matrix_eps), state.bases)
            out = jax.tree.map(step, mu, nu, roots)
        return _like(out, updates), KroneckerState(count, mu, nu, factors, roots)

    return optax.GradientTransformation(_init(max_precond_dim), update)


def _check_frequency(steps: int) -> None:
    if steps < 1:
        raise ConfigError(f"precondition_frequency={steps}, but it counts steps: 1 or more")


def _init(max_precond_dim: int) -> Callable[[PyTree], KroneckerState]:
    def sides(key_path: tuple[Any, ...], p: jax.Array) -> Sides:
        if not MATRICES.search(tree.path_of(key_path)):
            return {}
        lengths = {side: p.shape[axis] for side, axis in AXES.items()}
        return {side: jnp.zeros((*p.shape[:-2], n, n)) for side, n in lengths.items() if n <= max_precond_dim}

    def init(params: PyTree) -> KroneckerState:
        mu, nu = (jax.tree.map(lambda p: jnp.zeros(p.shape), params) for _ in range(2))
        factors, bases = (jax.tree_util.tree_map_with_path(sides, params) for _ in range(2))
        return KroneckerState(jnp.zeros([], jnp.int32), mu, nu, factors, bases)

    return init


def _like(out: PyTree, updates: PyTree) -> PyTree:
    return jax.tree.map(lambda x, u: x.astype(u.dtype), out, updates)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x**2, axis=(-2, -1), keepdims=True))


def _multiply(x: jax.Array, sides: Sides) -> jax.Array:
    """left x rightᵀ: out of an eigenbasis, or by symmetric roots."""
    x = sides["left"] @ x if "left" in sides else x
    return x @ sides["right"].mT if "right" in sides else x


def _into(x: jax.Array, bases: Sides) -> jax.Array:
    """leftᵀ x right."""
    return _multiply(x, {side: basis.mT for side, basis in bases.items()})


def _accumulate(factors: PyTree, gradients: PyTree, decay: ArrayLike) -> PyTree:
    def average(g: jax.Array, sides: Sides) -> Sides:
        outer = {"left": lambda: g @ g.mT, "right": lambda: g.mT @ g}
        return {side: jnp.add(decay * factor, (1 - decay) * outer[side]()) for side, factor in sides.items()}

    return jax.tree.map(average, gradients, factors)


def _power_iteration(factors: PyTree, bases: PyTree, nu: PyTree) -> tuple[PyTree, PyTree]:
    """The next eigenvectors from the last ones, and second moments in their order."""

    def refresh(v: jax.Array, sides: Sides, basis: Sides) -> tuple[jax.Array, Sides]:
        out = {}
        for side, q in basis.items():
            product = sides[side] @ q
            order = jnp.argsort(jnp.sum(q * product, axis=-2), axis=-1, descending=True)
            out[side] = _one_by_one(_qr, jnp.take_along_axis(product, order[..., None, :], axis=-1))
            v = jnp.take_along_axis(v, order[..., :, None] if side == "left" else order[..., None, :], axis=AXES[side])
        return v, out

    pairs = jax.tree.map(refresh, nu, factors, bases)
    new_nu, new_bases = (jax.tree.map(lambda _, pair, i=i: pair[i], nu, pairs) for i in range(2))
    return new_bases, new_nu


def _inverse_roots(like: PyTree, factors: PyTree, matrix_eps: ArrayLike) -> PyTree:
    """Of one side the power -1/2, of two sides -1/4 each. `like`: a tree of the parameters' form."""

    def root(factor: jax.Array, power: float) -> jax.Array:
        values, vectors = _one_by_one(_eigh, factor)
        values = jnp.maximum(values, 0) + matrix_eps * jnp.maximum(values[..., -1:], 0) + TINY
        return (vectors * values[..., None, :] ** power) @ vectors.mT

    def roots(_: jax.Array, sides: Sides) -> Sides:
        return {side: root(factor, -1 / (2 * len(sides))) for side, factor in sides.items()}

    return jax.tree.map(roots, like, factors)


def _one_by_one(decompose: Callable[[jax.Array], Any], x: jax.Array) -> Any:
    """Of each matrix in [..., n, n].

    Not as a batch, which on the CPU is shared out over XLA's threads by a call that blocks one of them: several such
    calls at a time wait for each other forever (jaxlib 0.10.2, ParallelBatchMap in lapack_kernels.cc).
    """
    out = jax.lax.map(decompose, x.reshape(-1, *x.shape[-2:]))
    return jax.tree.map(lambda y: y.reshape(*x.shape[:-2], *y.shape[1:]), out)


@jax.custom_batching.sequential_vmap
def _eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors


@jax.custom_batching.sequential_vmap
def _qr(matrix: jax.Array) -> jax.Array:
    return jnp.linalg.qr(matrix)[0]


def _when(due: jax.Array, compute: Callable[[], PyTree], old: PyTree) -> PyTree:
    """compute() where `due`, else `old`; computed only where it is due, in some lane at least."""

    def chosen() -> PyTree:
        return jax.tree.map(lambda new, last: jnp.where(due, new, last), compute(), old)

    return jax.lax.cond(_in_any_lane(due), chosen, lambda: old)


@jax.custom_batching.custom_vmap
def _in_any_lane(due: jax.Array) -> jax.Array:
    """`due`, and under vmap one answer for all lanes: with an answer a lane, vmap runs both branches of a cond."""
    return due


@_in_any_lane.def_vmap
def _of_all_lanes(axis_size: int, in_batched: list[bool], due: jax.Array) -> tuple[jax.Array, bool]:
    del axis_size, in_batched
    return _in_any_lane(jnp.any(due)), False
