"""FRUGAL: Adam on a changing share of each matrix's columns, signs on the rest.

Of a matrix with gradient G [in, out], k = density * out columns C are active. They are
drawn anew every `period` steps, and with t the steps since the draw

    m <- b1 m + (1 - b1) G_C,    v <- b2 v + (1 - b2) G_C^2,    both [in, k], from 0,

    U_C = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps),
    U_rest = free_scale sign(G_rest).

So the update has full rank, and the state is a share `density` of Adam's. With density
1 the first period is Adam's; with density 0 it is signSGD. All parameters that are not
matrices have Adam's update.

Differs from the paper in: of its projections only that onto columns, and of its
state-free rules only the signs are here. The columns are not stored but found again at
every step from the seed and the number of draws before. Each layer of a stack has its
own.

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
    SHARE,
    Range,
    check,
)
from jaxlab.optimizers.trees import check_agree, with_specs
from jaxlab.params import named_leaves, path_name


class FRUGALState(NamedTuple):
    """State of `scale_by_frugal`.

    Attributes:
        count: steps made.
        mu: mean gradients; of a matrix ``[*stack, in, k]``, of its active columns.
        nu: mean squares of gradients, likewise.
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
        "below 0 it would climb the loss, and 0 leaves what has no state where it is",
        least=0.0,
    ),
    "b1": MEMORY,
    "b2": MEMORY,
    "eps": POSITIVE,
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
    """Adam's update of active columns and of all that is no matrix; else signs.

    Args:
        specs: tree of `ParamSpec`; matrices are the parameters of role "matrix". None
            derives the roles from the arrays, as `jaxlab.params.infer` does.
        density: share of a matrix's columns that is active, rounded, and at least one
            column unless it is 0.
        period: steps between draws of the columns.
        free_scale: size of an update without state; 1 is about that of Adam's.
        b1: memory of the mean gradient.
        b2: memory of the mean square.
        eps: keeps the denominator from 0.
        seed: of the columns.

    Raises:
        ValueError: a setting outside its range, or trees that differ in a leaf.
    """
    check(
        RANGES,
        density=density,
        period=period,
        free_scale=free_scale,
        b1=b1,
        b2=b2,
        eps=eps,
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
        check_agree(updates, state.mu, "parameters given to init", shapes=False)
        draws, t = state.count // period, state.count % period
        key = jax.random.fold_in(jax.random.key(seed), draws)

        def one(name, g, mu, nu):
            k = active[name]
            if k is None:
                return adam(g, mu, nu, state.count + 1)
            u = free_scale * jnp.sign(g)
            if k == 0:
                return u, mu, nu
            own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
            order = _permutations(own_key, (*g.shape[:-2], g.shape[-1]))
            mu, nu = (jnp.where(t == 0, jnp.zeros_like(m), m) for m in (mu, nu))
            part, mu, nu = adam(_columns(g, order[..., :k]), mu, nu, t + 1)
            place = jnp.argsort(order)  # of each column in the order
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

    The columns are drawn by the path of a matrix, so that the same arrays under other
    names have other columns.

    Args:
        learning_rate: a number or a schedule.
        density: share of a matrix's columns that Adam moves, and has a state for.
        period: steps between draws of the columns.
        free_scale: size of an update without state; 1 is about that of Adam's.
        b1: memory of the mean gradient.
        b2: memory of the mean square.
        eps: keeps the denominator from 0.
        seed: of the columns.
        weight_decay: share of the weights that is taken away at each step, times the
            learning rate; of matrices and heads, not of other roles.
        clip: largest norm of the whole gradient; None for no clipping.
        specs: tree of `ParamSpec`; None derives the roles from the arrays, as
            `jaxlab.params.infer` does.

    Returns:
        A transformation whose `update` takes the parameters too.

    Raises:
        ValueError: a setting outside its range; or, at `init` and `update`, trees that
            differ in a leaf, which is named.

    Reference: Zmushko et al., arXiv 2411.07837.
    """
    own: dict[str, Any] = dict(density=density, period=period, free_scale=free_scale)
    adam: dict[str, Any] = dict(b1=b1, b2=b2, eps=eps)

    def method(specs):
        return scale_by_frugal(specs, **own, **adam, seed=seed)

    check(RANGES, **own, **adam)
    return recipe(learning_rate, specs, method, weight_decay=weight_decay, clip=clip)


@dataclasses.dataclass(frozen=True)
class FRUGAL:
    """Settings of FRUGAL."""

    learning_rate: float = 3e-3  # the peak
    schedule: Schedule = WarmupCosine()
    weight_decay: float = 0.1  # times the learning rate
    density: float = 0.25  # share of a matrix's columns that Adam moves
    period: int = 200  # steps between draws of the columns
    free_scale: float = 1.0  # of the signs of the rest; the paper fine-tunes with 0.1
    b1: float = 0.9  # memory of the mean gradient
    b2: float = 0.95  # memory of the mean square
    eps: float = 1e-8
    clip: float | None = 1.0  # largest norm of the whole gradient; None for any
    seed: int = 0  # of the columns

    def __post_init__(self):
        check(RANGES, **vars(self))

    def build(self, specs: Any, steps: int) -> optax.GradientTransformationExtraArgs:
        """The transformation for parameters `specs` and a run of `steps`."""
        return from_settings(frugal, self, specs, steps)


def _active_columns(specs: Any, density: float) -> dict[str, int | None]:
    """How many columns of each parameter are active; None for what is no matrix."""
    counts = {}
    for name, spec in named_leaves(specs):
        if spec.role != "matrix":
            counts[name] = None
        else:
            counts[name] = max(round(density * spec.shape[-1]), 1) if density else 0
    return counts


def _permutations(key, shape):
    """One permutation of the last axis for each of the rest."""
    return jnp.argsort(jax.random.uniform(key, shape, jnp.float32))


def _columns(x, indices):
    """Columns ``[*stack, k]`` of matrices ``[*stack, in, out]``."""
    return jnp.take_along_axis(x, indices[..., None, :], axis=-1)
