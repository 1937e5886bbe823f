"""Fitness to weights: how much each member of a population counts in the update.

Fitness is to be maximised. Fitness that is not finite counts as the worst finite one;
integers (counts of right answers, say) and booleans count as numbers.
A population whose members are equally fit has no direction (`informative`), and the
strategy gives all of them the weight 0.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

EPSILON = 1e-5  # added to variances


def finite(fitness: Float[Array, " N"]) -> Float[Array, " N"]:
    """Replace fitness that is not finite by the worst finite one.

    If none is finite, all are zero. Integers and booleans become float32.
    """
    if not jnp.issubdtype(fitness.dtype, jnp.floating):
        return fitness.astype(jnp.float32)
    good = jnp.isfinite(fitness)
    worst = jnp.min(jnp.where(good, fitness, jnp.inf))
    worst = jnp.where(jnp.isfinite(worst), worst, 0.0)
    return jnp.where(good, fitness, worst)


def informative(fitness: Float[Array, " N"]) -> Bool[Array, ""]:
    """Whether any two members differ in fitness."""
    fitness = finite(fitness)
    return jnp.max(fitness) > jnp.min(fitness)


@dataclasses.dataclass(frozen=True)
class Raw:
    """The fitness itself; with `scaling="unbiased"` the update is its gradient."""

    def __call__(self, fitness: Float[Array, " N"]) -> Float[Array, " N"]:
        return finite(fitness)


@dataclasses.dataclass(frozen=True)
class ZScore:
    """(f - mean) / sqrt(variance + 1e-5)."""

    def __call__(self, fitness: Float[Array, " N"]) -> Float[Array, " N"]:
        fitness = finite(fitness)
        return (fitness - fitness.mean()) / jnp.sqrt(fitness.var() + EPSILON)


@dataclasses.dataclass(frozen=True)
class CentredRanks:
    """rank / (N - 1) - 1/2; members of equal fitness get the mean of their ranks."""

    def __call__(self, fitness: Float[Array, " N"]) -> Float[Array, " N"]:
        ordered = jnp.sort(finite(fitness))
        below, up_to = (
            jnp.searchsorted(ordered, finite(fitness), side=side).astype(jnp.float32)
            for side in ("left", "right")
        )
        rank = (below + up_to - 1) / 2
        return rank / max(len(fitness) - 1, 1) - 0.5


@dataclasses.dataclass(frozen=True)
class GroupZScore:
    """(f - mean of its group) / deviation, with one deviation for the population.

    For fitness that depends on the question asked, so that all questions count alike.

    Attributes:
        size: members of a group, which are consecutive and are asked the same.
    """

    size: int

    def check(self, population: int) -> None:
        """Raise ValueError if groups do not divide a population."""
        if self.size < 2 or population % self.size:
            raise ValueError(
                f"A group has {self.size} members, but must have at least 2 and divide "
                f"the population of {population}."
            )

    def __call__(self, fitness: Float[Array, " N"]) -> Float[Array, " N"]:
        self.check(len(fitness))
        fitness = finite(fitness)
        groups = fitness.reshape(-1, self.size)
        centred = (groups - groups.mean(1, keepdims=True)).reshape(-1)
        return centred / jnp.sqrt(fitness.var() + EPSILON)


@dataclasses.dataclass(frozen=True)
class Sign:
    """Half the sign of the difference within each antithetic pair, to either member."""

    def __call__(self, fitness: Float[Array, " N"]) -> Float[Array, " N"]:
        plus, minus = finite(fitness).reshape(-1, 2).T
        sign = jnp.sign(plus - minus)
        return jnp.stack([sign, -sign], 1).reshape(-1) / 2


Shaping = Raw | ZScore | CentredRanks | GroupZScore | Sign
