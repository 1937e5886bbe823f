"""FRUGAL: Adam on a changing share of each matrix's columns, signs on the rest.

In a matrix with gradient G [in, out], k = density * out columns C are active. They are
redrawn every `period` steps. With t the number of steps since the draw,

    m <- b1 m + (1 - b1) G_C,    v <- b2 v + (1 - b2) G_C^2,    both [in, k], from 0,

    U_C = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps),
    U_rest = free_scale sign(G_rest).

So the update has full rank, and the state is `density` times the size of Adam's. With
density 1 the first period is Adam's; with density 0 it is signSGD. All parameters that
are not matrices get Adam's update.

Differs from the paper in: only its projection onto columns and its state-free rule of
signs are implemented. The columns are not stored but recomputed at every step from the
seed and the number of earlier draws. Each layer of a stack has its own columns.

Reference: Zmushko et al., FRUGAL: Memory-Efficient Optimization by Reducing State
Overhead for Scalable Training, arXiv 2411.07837.
"""

import dataclasses
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from jaxlab.optimizers.recipe import from_settings, recipe
from jaxlab.optimizers.schedules import Schedule, WarmupCosine
from jaxlab.optimizers.settings import (
    MEMORY,
    PERIOD,
    POSITIVE,
    RECIPE,
    SEED,
    SHARE,
    Range,
    check,
)
from jaxlab.optimizers.trees import with_specs
from jaxlab.params import named_leaves, path_name


class FRUGALState(NamedTuple):
    """State of `scale_by_frugal`.

    Attributes:
        count: steps made.
        mu: mean gradients; for a matrix, of its active columns ``[*stack, in, k]``.
        nu: mean squares of the gradients, in the same shapes.
    """

    count: Int[Array, ""]
    mu: Any
    nu: Any


RANGES = {
    **RECIPE,
    "density": SHARE,
    "period": PERIOD,
    "free_scale": Range(
        "finite and at least 0",
        "below 0 it would climb the loss, and 0 leaves inactive columns unchanged",
        least=0.0,
    ),
    "b1": MEMORY,
    "b2": MEMORY,
    "eps": POSITIVE,
    "seed": SEED,
}


def scale_by_frugal(
    specs: Any = None,
    *,
    density: float = 0.25,
    period: int = 200,
    free_scale: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Adam's update for active columns and all non-matrices; signs for the rest.

    Args:
        specs: tree of `ParamSpec`; matrices are the parameters of role "matrix". None
            derives the roles from the arrays, as `jaxlab.params.infer` does.
        density: share of a matrix's columns that is active; rounded to a whole number
            of columns, at least one unless `density` is 0.
        period: steps between draws of the columns.
        free_scale: size of an update without state; at 1 it is about that of Adam's.
        b1: decay rate of the mean gradient.
        b2: decay rate of the mean square.
        eps: keeps the denominator from 0.
        seed: seeds the draws of columns.

    Raises:
        ValueError: a setting is outside its range, or trees differ in a leaf.
    """
    check(
        RANGES,
        density=density,
        period=period,
        free_scale=free_scale,
        b1=b1,
        b2=b2,
        eps=eps,
        seed=seed,
    )

    def make(specs):
        return _scale_by_frugal(specs, density, period, free_scale, b1, b2, eps, seed)

    return with_specs(specs, make)


def _scale_by_frugal(specs, density, period, free_scale, b1, b2, eps, seed):
    active = _active_columns(specs, density)
    structure = jax.tree.structure(specs)

    def init(params: Any) -> FRUGALState:
        def zeros(path, p):
            k = active[path_name(path)]
            shape = p.shape if k is None else (*p.shape[:-1], k)
            return jnp.zeros_like(p, shape=shape)

        mu, nu = (jax.tree_util.tree_map_with_path(zeros, params) for _ in range(2))
        return FRUGALState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates, state: Any, params=None, **_):
        del params
        draws, t = state.count // period, state.count % period
        key = jax.random.fold_in(jax.random.key(seed), draws)

        def one(name, g, mu, nu):
            k = active[name]
            if k is None:
                return adam(g, mu, nu, state.count + 1)
            u = free_scale * jnp.sign(g)
            if k == 0:
                return u, mu, nu
            key_of_leaf = jax.random.fold_in(key, zlib.crc32(name.encode()))
            order = _permutations(key_of_leaf, (*g.shape[:-2], g.shape[-1]))
            mu, nu = (jnp.where(t == 0, jnp.zeros_like(m), m) for m in (mu, nu))
            part, mu, nu = adam(_columns(g, order[..., :k]), mu, nu, t + 1)
            place = jnp.argsort(order)  # where the order has each column
            back = _columns(part, jnp.minimum(place, k - 1))
            return jnp.where((place < k)[..., None, :], back, u), mu, nu

        def adam(g, mu, nu, t):
            x, t = g.astype(mu.dtype), t.astype(jnp.float32)
            mu = (1 - b1) * x + b1 * mu
            nu = (1 - b2) * x**2 + b2 * nu
            mean = optax.tree.bias_correction(mu, b1, t)
            square = optax.tree.bias_correction(nu, b2, t)
            return (mean / (jnp.sqrt(square) + eps)).astype(g.dtype), mu, nu

        trees = (structure.flatten_up_to(x) for x in (updates, state.mu, state.nu))
        new = [one(*leaf) for leaf in zip(active, *trees, strict=True)]
        updates, mu, nu = (structure.unflatten([x[i] for x in new]) for i in range(3))
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, FRUGALState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def frugal(
    learning_rate: float | optax.Schedule,
    *,
    density: float = 0.25,
    period: int = 200,
    free_scale: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    seed: int = 0,
    weight_decay: float = 0.0,
    clip: float | None = None,
    specs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """FRUGAL on any pytree: Adam on a share of a matrix's columns, signs on the rest.

    The draw depends on the path of a matrix, so the same arrays under other names get
    other columns.

    Args:
        learning_rate: a number or a schedule.
        density: share of a matrix's columns that Adam updates and keeps a state for.
        period: steps between draws of the columns.
        free_scale: size of an update without state; at 1 it is about that of Adam's.
        b1: decay rate of the mean gradient.
        b2: decay rate of the mean square.
        eps: keeps the denominator from 0.
        seed: seeds the draws of columns.
        weight_decay: each step subtracts this share of the weights, times the learning
            rate; only for the roles "matrix" and "head".
        clip: largest global norm of the gradient; None for no clipping.
        specs: tree of `ParamSpec`; None derives the roles from the arrays, as
            `jaxlab.params.infer` does.

    Returns:
        A transformation whose `update` also takes the parameters.

    Raises:
        ValueError: a setting is outside its range; or, from `init` and `update`, trees
            differ in a leaf, which the message names.

    Reference: Zmushko et al., arXiv 2411.07837.
    """
    columns: dict[str, Any] = dict(
        density=density, period=period, free_scale=free_scale
    )
    adam: dict[str, Any] = dict(b1=b1, b2=b2, eps=eps)

    def method(specs):
        return _scale_by_frugal(specs, **columns, **adam, seed=seed)

    check(RANGES, **columns, **adam, seed=seed)
    return recipe(learning_rate, specs, method, weight_decay=weight_decay, clip=clip)


@dataclasses.dataclass(frozen=True)
class FRUGAL:
    """Settings of FRUGAL."""

    learning_rate: float = 3e-3  # at its peak
    schedule: Schedule = WarmupCosine()
    weight_decay: float = 0.1  # multiplied by the learning rate
    density: float = 0.25  # share of a matrix's columns that Adam updates
    period: int = 200  # steps between draws of the columns
    free_scale: float = 1.0  # times the signs; the paper fine-tunes with 0.1
    b1: float = 0.9  # decay rate of the mean gradient
    b2: float = 0.95  # decay rate of the mean square
    eps: float = 1e-8
    clip: float | None = 1.0  # largest global norm of the gradient; None: no clipping
    seed: int = 0  # seeds the draws of columns

    def __post_init__(self):
        check(RANGES, **vars(self))

    def build(self, specs: Any, steps: int) -> optax.GradientTransformationExtraArgs:
        """The transformation for parameters `specs` and a run of `steps`."""
        return from_settings(frugal, self, specs, steps)


def _active_columns(specs: Any, density: float) -> dict[str, int | None]:
    """The number of active columns of each parameter; None if it is no matrix."""
    counts = {}
    for name, spec in named_leaves(specs):
        if spec.role != "matrix":
            counts[name] = None
        else:
            counts[name] = max(round(density * spec.shape[-1]), 1) if density else 0
    return counts


def _permutations(key, shape):
    """Independent random permutations along the last axis."""
    return jnp.argsort(jax.random.uniform(key, shape, jnp.float32))


def _columns(x, indices):
    """Columns ``[*stack, k]`` of matrices ``[*stack, in, out]``."""
    return jnp.take_along_axis(x, indices[..., None, :], axis=-1)
