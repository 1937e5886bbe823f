"""Named shapes and named hard inputs of the selective scan, for tests and benchmarks.

Steps and rates of a fresh Mamba layer are easy. What breaks an algorithm is in `HARD`:
no decay at all (sums over the whole sequence), states that vanish within a token, both
side by side, and inputs that repeat.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Shape(NamedTuple):
    """Batch, tokens, channels, states a channel."""

    B: int
    T: int
    E: int
    N: int


SHAPES = {
    "small": Shape(B=2, T=150, E=24, N=4),
    "long": Shape(B=2, T=2048, E=512, N=16),
    "training": Shape(B=8, T=256, E=256, N=16),
}


def _steps(low, high):
    """Log-uniform between low and high."""

    def draw(rng, shape):
        size = (shape.B, shape.T, shape.E)
        return np.exp(rng.uniform(np.log(low), np.log(high), size))

    return draw


def _mixed_steps(rng, shape):
    values = (0.0, 1e-6, 1e-3, 1e-3, 0.1, 1.0, 1e2)
    return rng.choice(values, (shape.B, shape.T, shape.E))


def _mamba(rng, shape):
    """The rates a layer starts with: -1, -2, ..., -N."""
    return -np.broadcast_to(np.arange(1.0, shape.N + 1), (shape.E, shape.N))


def _rates(*values):
    """Each rate one of `values`, up to a tenth more."""

    def draw(rng, shape):
        size = (shape.E, shape.N)
        return rng.choice(values, size) * rng.uniform(1, 1.1, size)

    return draw


def _random(rng, *size):
    return rng.standard_normal(size)


def _repeated(rng, *size):
    """A row's tokens are all alike."""
    rows, _, *rest = size
    return np.broadcast_to(rng.standard_normal((rows, 1, *rest)), size)


class Hard(NamedTuple):
    """The ways to draw steps, rates and the vectors x, B and C."""

    dt: Callable
    A: Callable
    vectors: Callable = _random


HARD = {
    "random": Hard(_steps(1e-3, 1e-1), _mamba),
    "tiny_steps": Hard(_steps(1e-6, 1e-6), _mamba),
    "large_steps": Hard(_steps(1e2, 1e2), _mamba),
    "no_decay": Hard(_steps(1e-3, 1e-1), _rates(0.0)),
    "no_decay_repeated": Hard(_steps(0.1, 0.1), _rates(0.0), _repeated),
    "slow_decay_repeated": Hard(_steps(0.1, 1), _rates(-1e-3), _repeated),
    "strong_decay": Hard(_steps(1e-3, 1e-1), _rates(-1e4)),
    "mixed": Hard(_mixed_steps, _rates(0.0, -1e-3, -1.0, -30.0, -1e4)),
    "mixed_repeated": Hard(_mixed_steps, _rates(0.0, -1e-3, -1.0, -1e4), _repeated),
}


def draw(name: str, shape: Shape, seed: int = 0) -> dict[str, np.ndarray]:
    """The named hard input in float32.

    Returns:
        x, dt, A, B, C, D, initial_state, and the gradients d_y and d_state of the two
        results.
    """
    rng = np.random.default_rng([seed, *name.encode()])
    hard = HARD[name]
    B, T, E, N = shape
    inputs = {
        "x": hard.vectors(rng, B, T, E),
        "dt": hard.dt(rng, shape),
        "A": hard.A(rng, shape),
        "B": hard.vectors(rng, B, T, N),
        "C": hard.vectors(rng, B, T, N),
        "D": rng.standard_normal(E),
        "initial_state": rng.standard_normal((B, E, N)),
        "d_y": rng.standard_normal((B, T, E)),
        "d_state": rng.standard_normal((B, E, N)),
    }
    return {name: x.astype(np.float32) for name, x in inputs.items()}
