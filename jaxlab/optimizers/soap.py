"""SOAP: Adam in the eigenbases of Shampoo's factors.

For a weight in y = x W with gradient G [in, out], the mean M of the gradients, the
factors L and R of `shampoo`, and bases Q_L and Q_R of their eigenvectors (Algorithm 3
of the paper):

    G' = Q_L^T G Q_R,    M <- b1 M + (1 - b1) G,    M' = Q_L^T M Q_R,
    V <- b2 V + (1 - b2) G' * G',
    N' = M' / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps),    U = Q_L N' Q_R^T.

After every `period` steps each basis is renewed by one step of power iteration,
Q <- QR(L Q) (Algorithm 4). M is stored in the original coordinates, so it is projected
again at each step. V is carried over, because the bases change slowly.

As in the authors' code, the first gradient only initialises L, R and the bases: it
updates no weight that has a basis and enters neither M nor V, since its squares in a
basis computed from itself are not typical of later gradients. Before a QR step the
columns q of a basis are sorted by q^T L q, largest first, and V with them: in another
order QR would turn them away from the directions in which V was measured.

A side longer than `largest` has the identity as its basis. Weights with both sides
longer, and parameters of roles other than "matrix", get Adam from the first step on.

Differs from the paper in: eps is added to the square root, not under it, and after the
bias correction of V, as in Adam; parameters that have no basis are updated in the first
step.

Reference: Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam, arXiv
2409.11321.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

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
from jaxlab.optimizers.shampoo import Sides, averaged, between, identities
from jaxlab.optimizers.trees import beside, with_specs
from jaxlab.params import named_leaves

NO_BASES = Sides(None, None)
RANGES = {
    **RECIPE,
    "b1": MEMORY,
    "b2": MEMORY,
    "eps": POSITIVE,
    "period": PERIOD,
    "largest": SIDE,
}


class SOAPState(NamedTuple):
    """State of `scale_by_soap`, in float32.

    Attributes:
        count: steps made.
        mu: mean of the gradients, like the parameters.
        nu: mean of their squares in the bases, like the parameters.
        factors: L and R of each weight that has a basis, by its path.
        bases: Q_L and Q_R of each such weight; their columns are the eigenvectors.
    """

    count: Int[Array, ""]
    mu: Any
    nu: Any
    factors: dict[str, Sides]
    bases: dict[str, Sides]


def scale_by_soap(
    specs: Any = None,
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    period: int = 10,
    largest: int = 8192,
) -> optax.GradientTransformationExtraArgs:
    """Compute Adam's update of each matrix in its eigenbases.

    Under a mesh every device stores all factors and bases.

    Args:
        specs: tree of `ParamSpec`; None derives the roles from the arrays, as
            `jaxlab.params.infer` does.
        b1: decay rate of the mean gradient.
        b2: decay rate of the mean squares and the factors.
        eps: added to the root of the mean square.
        period: steps between renewals of the bases.
        largest: longest side that has a basis.

    Raises:
        ValueError: a setting is outside its range, or trees differ in a leaf.
    """
    settings: dict[str, Any] = dict(
        b1=b1, b2=b2, eps=eps, period=period, largest=largest
    )
    check(RANGES, **settings)

    def make(specs):
        return _scale_by_soap(specs, **settings)

    return with_specs(specs, make)


def _scale_by_soap(specs, b1, b2, eps, period, largest):
    structure = jax.tree.structure(specs)
    names = [name for name, _ in named_leaves(specs)]

    def by_name(tree):
        return dict(zip(names, structure.flatten_up_to(tree), strict=True))

    def as_tree(named):
        return structure.unflatten([named[name] for name in names])

    def init(params) -> Any:
        bases = identities(specs, largest)
        return SOAPState(
            count=jnp.zeros((), jnp.int32),
            mu=optax.tree.zeros_like(params, dtype=jnp.float32),
            nu=optax.tree.zeros_like(params, dtype=jnp.float32),
            factors=beside(specs, jax.tree.map(jnp.zeros_like, bases)),
            bases=beside(specs, bases),
        )

    def update(updates, state: Any, params=None, **_):
        del params
        mu, nu, steps = by_name(state.mu), by_name(state.nu), {}
        factors = {}
        for name, gradient in by_name(updates).items():
            g = gradient.astype(jnp.float32)
            t = state.count + 1
            if name in state.bases:
                factors[name] = averaged(state.factors[name], g, b2)
                t = state.count  # the first step has no bases yet
                g = jnp.where(t > 0, g, 0.0)
            t = jnp.maximum(t, 1).astype(jnp.float32)
            q = state.bases.get(name, NO_BASES)
            mu[name] = b1 * mu[name] + (1 - b1) * g
            nu[name] = b2 * nu[name] + (1 - b2) * _into(q, g) ** 2
            m = _into(q, mu[name]) / (1 - b1**t)
            u = _out_of(q, m / (jnp.sqrt(nu[name] / (1 - b2**t)) + eps))
            steps[name] = u.astype(gradient.dtype)

        def initialise(bases, nu):
            del bases
            return jax.tree.map(lambda F: jnp.linalg.eigh(F)[1], factors), nu

        def renew(bases, nu):
            bases, nu = dict(bases), dict(nu)
            for name, pair in factors.items():
                bases[name], nu[name] = _renewed(pair, bases[name], nu[name])
            return bases, nu

        renews = state.count % period == 0
        bases, nu = jax.lax.switch(
            jnp.where(state.count == 0, 0, jnp.where(renews, 1, 2)),
            [initialise, renew, lambda bases, nu: (bases, nu)],
            state.bases,
            nu,
        )
        bases = jax.tree.map(whole, bases)
        mu, nu, steps = as_tree(mu), as_tree(nu), as_tree(steps)
        return steps, SOAPState(state.count + 1, mu, nu, factors, bases)

    return optax.GradientTransformationExtraArgs(init, update)


def _into(q: Sides, g):
    """Q_L^T G Q_R."""
    return between(_transposed(q.left), g, q.right)


def _out_of(q: Sides, g):
    """Q_L G Q_R^T."""
    return between(q.left, g, _transposed(q.right))


def _transposed(q):
    return None if q is None else q.mT


def _renewed(factors: Sides, q: Sides, v) -> tuple[Sides, Array]:
    """The bases after a step of power iteration, and V in their order."""
    left, v = _renewed_side(factors.left, q.left, v, axis=-2)
    right, v = _renewed_side(factors.right, q.right, v, axis=-1)
    return Sides(left, right), v


def _renewed_side(factor, q, v, axis):
    if q is None:
        return None, v
    powers = product(factor, q)
    order = jnp.argsort(-jnp.sum(q * powers, axis=-2), axis=-1)
    along = {-2: order[..., :, None], -1: order[..., None, :]}
    powers = jnp.take_along_axis(powers, along[-1], axis=-1)
    v = jnp.take_along_axis(v, along[axis], axis=axis)
    return jnp.linalg.qr(powers)[0], v


def soap(
    learning_rate: float | optax.Schedule,
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    period: int = 10,
    largest: int = 8192,
    weight_decay: float = 0.0,
    clip: float | None = None,
    specs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """SOAP on any pytree: Adam in the eigenbases of Shampoo's factors of each matrix.

    Args:
        learning_rate: a number or a schedule.
        b1: decay rate of the mean gradient.
        b2: decay rate of the mean squares and the factors.
        eps: added to the root of the mean square.
        period: steps between renewals of the eigenbases.
        largest: longest side that has a basis.
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

    Reference: Vyas et al., arXiv 2409.11321.
    """
    settings: dict[str, Any] = dict(
        b1=b1, b2=b2, eps=eps, period=period, largest=largest
    )

    def method(specs):
        return _scale_by_soap(specs, **settings)

    check(RANGES, **settings)
    return recipe(learning_rate, specs, method, weight_decay=weight_decay, clip=clip)


@dataclasses.dataclass(frozen=True)
class SOAP:
    """Settings of SOAP."""

    learning_rate: float = 3e-3  # at its peak
    schedule: Schedule = WarmupCosine()
    weight_decay: float = 0.1  # multiplied by the learning rate
    b1: float = 0.95  # decay rate of the mean gradient
    b2: float = 0.95  # decay rate of the mean squares and the factors
    eps: float = 1e-8
    period: int = 10  # steps between renewals of the eigenbases
    largest: int = 8192  # longest side that has a basis
    clip: float | None = 1.0  # largest global norm of the gradient; None: no clipping

    def __post_init__(self):
        check(RANGES, **vars(self))

    def build(self, specs: Any, steps: int) -> optax.GradientTransformationExtraArgs:
        """The transformation for parameters `specs` and a run of `steps`."""
        return from_settings(soap, self, specs, steps)
