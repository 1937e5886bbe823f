"""Shampoo: gradients multiplied by inverse roots of their second moments, both sides.

For a weight in y = x W with gradient G [in, out] and its mean M, Adam's first moment,

    L <- b2 L + (1 - b2) G G^T,    R <- b2 R + (1 - b2) G^T G,
    U = L^(-1/4) M R^(-1/4),       U <- U ||A|| / ||U||,

where A is Adam's update: Shampoo gives the direction, Adam the length ("grafting", Anil
et al.). The roots are renewed every `period` steps from an eigendecomposition, with
`ridge` times the largest eigenvalue added to all. A side longer than `largest` is not
preconditioned, and the other one then has the power -1/2, since the powers of both
sides add up to -1/2. Weights with both sides longer than `largest`, and parameters of
roles other than "matrix", get A.

Differs from the papers in: L and R are exponential averages where Gupta et al. sum from
L = ridge I; the ridge is relative, as in Anil et al., so the scale of the gradients
does not matter; the mean of the gradients is preconditioned, where the code of Anil et
al. averages preconditioned gradients; long sides are not preconditioned, where they are
split into blocks or approximated by a diagonal; roots are computed from eigenvalues,
not by Newton's iteration; the length is Adam's, not AdaGrad's; and the first step is
already preconditioned.

Reference: Gupta, Koren, Singer, Shampoo: Preconditioned Stochastic Tensor Optimization,
arXiv 1802.09568. Anil, Gupta, Koren, Regan, Singer, Scalable Second Order Optimization
for Deep Learning, arXiv 2002.09018.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxlab.optimizers.factors import product, whole
from jaxlab.optimizers.recipe import from_settings, recipe
from jaxlab.optimizers.schedules import Schedule, WarmupCosine
from jaxlab.optimizers.settings import (
    MEMORY,
    PERIOD,
    POSITIVE,
    RECIPE,
    SIDE,
    check,
)
from jaxlab.optimizers.trees import beside, with_specs
from jaxlab.params import named_leaves

SMALLEST = float(jnp.finfo(jnp.float32).tiny)
RANGES = {
    **RECIPE,
    "b1": MEMORY,
    "b2": MEMORY,
    "eps": POSITIVE,
    "ridge": POSITIVE,
    "period": PERIOD,
    "largest": SIDE,
}


class Sides(NamedTuple):
    """A square matrix for each side of a weight; None for a side that is too long."""

    left: Float[Array, "*stack in in"] | None
    right: Float[Array, "*stack out out"] | None


class ShampooState(NamedTuple):
    """State of `scale_by_shampoo`, in float32.

    Attributes:
        count: steps made.
        mu: mean of the gradients, like the parameters.
        nu: mean of their squares, like the parameters.
        factors: L and R of each preconditioned weight, by its path.
        roots: the inverse roots of L and R, as last renewed.
    """

    count: Int[Array, ""]
    mu: Any
    nu: Any
    factors: dict[str, Sides]
    roots: dict[str, Sides]


def scale_by_shampoo(
    specs: Any = None,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    ridge: float = 1e-6,
    period: int = 10,
    largest: int = 8192,
) -> optax.GradientTransformationExtraArgs:
    """Give each weight Shampoo's direction with the length of Adam's update.

    Under a mesh every device stores all factors and computes all roots.

    Args:
        specs: tree of `ParamSpec`; None derives the roles from the arrays, as
            `jaxlab.params.infer` does.
        b1: decay rate of the mean gradient.
        b2: decay rate of the mean squares and the factors.
        eps: added to the root of Adam's mean square.
        ridge: added to a factor's eigenvalues, as a share of the largest.
        period: steps between renewals of the roots.
        largest: longest side that is preconditioned.

    Raises:
        ValueError: a setting is outside its range, or trees differ in a leaf.
    """
    settings: dict[str, Any] = dict(
        b1=b1, b2=b2, eps=eps, ridge=ridge, period=period, largest=largest
    )
    check(RANGES, **settings)

    def make(specs):
        return _scale_by_shampoo(specs, **settings)

    return with_specs(specs, make)


def _scale_by_shampoo(specs, b1, b2, eps, ridge, period, largest):
    structure = jax.tree.structure(specs)
    names = [name for name, _ in named_leaves(specs)]

    def by_name(tree):
        return dict(zip(names, structure.flatten_up_to(tree), strict=True))

    def init(params) -> Any:
        roots = identities(specs, largest)
        return ShampooState(
            count=jnp.zeros((), jnp.int32),
            mu=optax.tree.zeros_like(params, dtype=jnp.float32),
            nu=optax.tree.zeros_like(params, dtype=jnp.float32),
            factors=beside(specs, jax.tree.map(jnp.zeros_like, roots)),
            roots=beside(specs, roots),
        )

    def update(updates, state: Any, params=None, **_):
        del params
        g = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, g)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, state.nu, g)
        t = (state.count + 1).astype(jnp.float32)
        adam = jax.tree.map(
            lambda m, v: m / (1 - b1**t) / (jnp.sqrt(v / (1 - b2**t)) + eps), mu, nu
        )

        gradients, means, steps = by_name(g), by_name(mu), by_name(adam)
        factors = {
            name: averaged(pair, gradients[name], b2)
            for name, pair in state.factors.items()
        }
        roots = jax.lax.cond(
            state.count % period == 0,
            lambda: {name: _roots(pair, ridge) for name, pair in factors.items()},
            lambda: state.roots,
        )
        roots = jax.tree.map(whole, roots)
        for name, root in roots.items():
            u = between(root.left, means[name], root.right)
            steps[name] = u * (_norm(steps[name]) / jnp.maximum(_norm(u), SMALLEST))
        steps = structure.unflatten([steps[name] for name in names])
        steps = jax.tree.map(lambda u, g: u.astype(g.dtype), steps, updates)
        return steps, ShampooState(state.count + 1, mu, nu, factors, roots)

    return optax.GradientTransformationExtraArgs(init, update)


def identities(specs: Any, largest: int) -> dict[str, Sides]:
    """Identities for the sides up to `largest` of the weights of role "matrix"."""
    sides = {}
    for name, spec in named_leaves(specs):
        if spec.role != "matrix":
            continue
        *stack, n_in, n_out = spec.shape
        if min(n_in, n_out) <= largest:
            left, right = (
                _identity(stack, n) if n <= largest else None for n in (n_in, n_out)
            )
            sides[name] = Sides(left, right)
    return sides


def _identity(stack, n):
    return jnp.broadcast_to(jnp.eye(n, dtype=jnp.float32), (*stack, n, n))


def averaged(factors: Sides, g: Float[Array, "*stack in out"], b2: float) -> Sides:
    """Add G G^T and G^T G to the running averages L and R."""
    new = Sides(
        None if factors.left is None else product(g, g.mT),
        None if factors.right is None else product(g.mT, g),
    )
    average = jax.tree.map(lambda F, x: b2 * F + (1 - b2) * x, factors, new)
    return jax.tree.map(whole, average)


def between(
    left: Float[Array, "*stack in in"] | None,
    g: Float[Array, "*stack in out"],
    right: Float[Array, "*stack out out"] | None,
) -> Float[Array, "*stack in out"]:
    """Return left G right, where None stands for the identity."""
    if left is not None:
        g = product(left, g)
    return g if right is None else product(g, right)


def _roots(factors: Sides, ridge) -> Sides:
    power = -0.5 / len(jax.tree.leaves(factors))

    def root(F):
        values, Q = jnp.linalg.eigh(F)
        values = jnp.maximum(values, 0.0)  # rounding makes some slightly negative
        largest = values[..., -1:]
        ridged = jnp.maximum(values + ridge * largest, SMALLEST)
        values = jnp.where(largest > 0, ridged, 1.0)  # no gradient yet: the identity
        return product(Q * values[..., None, :] ** power, Q.mT)

    return jax.tree.map(root, factors)


def _norm(x):
    return jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)


def shampoo(
    learning_rate: float | optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    ridge: float = 1e-6,
    period: int = 10,
    largest: int = 8192,
    weight_decay: float = 0.0,
    clip: float | None = None,
    specs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Shampoo on any pytree: L^(-1/4) M R^(-1/4) with the length of Adam's update.

    Args:
        learning_rate: a number or a schedule.
        b1: decay rate of the mean gradient.
        b2: decay rate of the mean squares and the factors.
        eps: added to the root of Adam's mean square.
        ridge: added to a factor's eigenvalues, as a share of the largest.
        period: steps between renewals of the inverse roots.
        largest: longest side that is preconditioned.
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

    Reference: Gupta et al., arXiv 1802.09568; Anil et al., arXiv 2002.09018.
    """
    settings: dict[str, Any] = dict(
        b1=b1, b2=b2, eps=eps, ridge=ridge, period=period, largest=largest
    )

    def method(specs):
        return _scale_by_shampoo(specs, **settings)

    check(RANGES, **settings)
    return recipe(learning_rate, specs, method, weight_decay=weight_decay, clip=clip)


@dataclasses.dataclass(frozen=True)
class Shampoo:
    """Settings of Shampoo."""

    learning_rate: float = 3e-3  # at its peak
    schedule: Schedule = WarmupCosine()
    weight_decay: float = 0.1  # multiplied by the learning rate
    b1: float = 0.9  # decay rate of the mean gradient
    b2: float = 0.95  # decay rate of the mean squares and the factors
    eps: float = 1e-8
    ridge: float = 1e-6  # added to eigenvalues, as a share of the largest
    period: int = 10  # steps between renewals of the inverse roots
    largest: int = 8192  # longest side that is preconditioned
    clip: float | None = 1.0  # largest global norm of the gradient; None: no clipping

    def __post_init__(self):
        check(RANGES, **vars(self))

    def build(self, specs: Any, steps: int) -> optax.GradientTransformationExtraArgs:
        """The transformation for parameters `specs` and a run of `steps`."""
        return from_settings(shampoo, self, specs, steps)
