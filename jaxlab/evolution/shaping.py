"""Fitness to weights: what a population's members count for in the update.

Fitness is to be maximised. Whatever is not finite counts as the worst of the finite.
A population without a difference has no direction, which `informative` says; the
strategy then gives nobody a weight.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

EPSILON = 1e-5  # of a variance


def finite(fitness: Float[Array, " N"]) -> Float[Array, " N"]:
    """The fitness, with the worst finite one in the place of what is not finite.

    All zero where nothing is finite.
    """
    good = jnp.isfinite(fitness)
    worst = jnp.min(jnp.where(good, fitness, jnp.inf))
    worst = jnp.where(jnp.isfinite(worst), worst, 0.0)
    return jnp.where(good, fitness, worst)


def informative(fitness: Float[Array, " N"]) -> Bool[Array, ""]:
    """Whether there are two members of different fitness."""
    fitness = finite(fitness)
    return jnp.max(fitness) > jnp.min(fitness)


@dataclasses.dataclass(frozen=True)
class Raw:
    """The fitness itself: with `scaling="unbiased"` the update is its gradient."""

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
    """rank / (N - 1) - 1/2, equal fitness the mean of its ranks."""

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
    """Each group's own mean, one deviation for all: (f - mean of group) / deviation.

    For fitness that depends on a question asked, all questions counting alike.

    Attributes:
        size: members a group, one behind the other; they were asked the same.
    """

    size: int

    def check(self, population: int) -> None:
        """Raises ValueError where groups do not divide a population."""
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
    """The sign of the difference within each antithetic pair, halved between them."""

    def __call__(self, fitness: Float[Array, " N"]) -> Float[Array, " N"]:
        plus, minus = finite(fitness).reshape(-1, 2).T
        sign = jnp.sign(plus - minus)
        return jnp.stack([sign, -sign], 1).reshape(-1) / 2


Shaping = Raw | ZScore | CentredRanks | GroupZScore | Sign
