"""Named shapes and named hard inputs of the delta rule.

Random keys with beta below 1 are easy for every algorithm. What breaks one is in
`HARD`: keys that repeat, steps that reflect (beta = 2), and decays of all sizes.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Shape(NamedTuple):
    """Batch, tokens, steps a token, heads, dimensions of keys and values."""

    B: int
    T: int
    N: int
    H: int
    K: int
    V: int


SHAPES = {
    "small": Shape(B=2, T=150, N=1, H=2, K=16, V=12),
    "long": Shape(B=1, T=2048, N=1, H=4, K=64, V=64),
    "wide": Shape(B=2, T=2048, N=1, H=8, K=128, V=128),
    "training": Shape(B=16, T=256, N=1, H=4, K=32, V=32),
    "training_two_steps": Shape(B=16, T=256, N=2, H=4, K=64, V=64),
}


def unit(x: np.ndarray) -> np.ndarray:
    """Vectors of length one."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _random_keys(rng, shape):
    return unit(rng.standard_normal((shape.B, shape.T, shape.N, shape.H, shape.K)))


def _few_keys(count, rank):
    """Every key one of `count`, all in a subspace of `rank` dimensions."""

    def draw(rng, shape):
        rank_ = min(rank, shape.K)
        basis = np.linalg.qr(rng.standard_normal((shape.K, rank_)))[0].T
        keys = unit(rng.standard_normal((count, rank_))) @ basis
        return keys[rng.integers(0, count, (shape.B, shape.T, shape.N, shape.H))]

    return draw


def _silu_keys(rng, shape):
    """All in nearly one direction, as after a SiLU."""
    x = rng.standard_normal((shape.B, shape.T, shape.N, shape.H, shape.K)) + 0.5
    return unit(x / (1 + np.exp(-x)))


def _beta(low, high):
    def draw(rng, shape):
        return rng.uniform(low, high, (shape.B, shape.T, shape.N, shape.H))

    return draw


def _decay(*values):
    """Each token's log decay one of `values`, up to a tenth more."""

    def draw(rng, shape):
        size = (shape.B, shape.T, shape.H)
        return rng.choice(values, size) * rng.uniform(1, 1.1, size)

    return draw


def _no_decay(rng, shape):
    return None


def _gate(rng, shape):
    """Decays like a trained gate's: mostly near zero, now and then strong."""
    x = rng.standard_normal((shape.B, shape.T, shape.H))
    return -np.logaddexp(0, 2 * x - 2)


class Hard(NamedTuple):
    """The ways to draw keys, step sizes and decays."""

    keys: Callable
    beta: Callable
    g: Callable


HARD = {
    "random": Hard(_random_keys, _beta(0, 1), _gate),
    "random_to_two": Hard(_random_keys, _beta(0, 2), _no_decay),
    "reflections": Hard(_random_keys, _beta(2, 2), _no_decay),
    "one_key": Hard(_few_keys(1, 1), _beta(2, 2), _no_decay),
    "one_key_overwritten": Hard(_few_keys(1, 1), _beta(1, 1), _no_decay),
    "three_keys": Hard(_few_keys(3, 3), _beta(2, 2), _no_decay),
    "twelve_keys": Hard(_few_keys(12, 3), _beta(2, 2), _no_decay),
    "twelve_keys_gated": Hard(_few_keys(12, 3), _beta(2, 2), _gate),
    "silu_keys": Hard(_silu_keys, _beta(1, 1), _no_decay),
    "silu_keys_gated": Hard(_silu_keys, _beta(1, 1), _gate),
    "zero_decay": Hard(_few_keys(12, 3), _beta(0, 2), _decay(0.0)),
    "tiny_decay": Hard(_few_keys(12, 3), _beta(0, 2), _decay(-1e-3, -1e-6)),
    "strong_decay": Hard(_random_keys, _beta(0, 2), _decay(-1e2)),
    "vanishing_decay": Hard(_random_keys, _beta(0, 2), _decay(-80.0, -20.0)),
    "extreme_decay": Hard(_random_keys, _beta(0, 2), _decay(-1e4)),
    "mixed_decay": Hard(
        _few_keys(12, 3), _beta(0, 2), _decay(-1e4, -1e2, -3.0, *(-1e-3,) * 20)
    ),
    "alternating_decay": Hard(_random_keys, _beta(1, 2), _decay(-1e4, *(-1e-3,) * 30)),
    "frequent_resets": Hard(_few_keys(12, 3), _beta(0, 2), _decay(-1e4, -1e-2)),
}


def draw(name: str, shape: Shape, seed: int = 0) -> dict[str, np.ndarray | None]:
    """The named hard input in float32, with the axes of `delta_product`.

    Returns:
        q, k, v, beta, g (or None), initial_state, and the gradients d_o and d_state
        of the two results.
    """
    rng = np.random.default_rng([seed, *name.encode()])
    hard = HARD[name]
    B, T, N, H, K, V = shape
    inputs = {
        "q": rng.standard_normal((B, T, H, K)),
        "k": hard.keys(rng, shape),
        "v": rng.standard_normal((B, T, N, H, V)),
        "beta": hard.beta(rng, shape),
        "g": hard.g(rng, shape),
        "initial_state": rng.standard_normal((B, H, K, V)),
        "d_o": rng.standard_normal((B, T, H, V)),
        "d_state": rng.standard_normal((B, H, K, V)),
    }
    return {
        name: None if x is None else x.astype(np.float32) for name, x in inputs.items()
    }
