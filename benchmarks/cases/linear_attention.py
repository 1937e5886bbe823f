"""Named shapes and named hard inputs of gated linear attention.

What breaks an algorithm is in `HARD`: no decay (sums over the whole sequence), decays
of all sizes side by side, exact resets, and keys that repeat.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

DECAYS = ("scalar", "channel")


class Shape(NamedTuple):
    """Batch, tokens, heads, dimensions of keys and values."""

    B: int
    T: int
    H: int
    K: int
    V: int


SHAPES = {
    "small": Shape(B=2, T=150, H=2, K=16, V=12),
    "long": Shape(B=1, T=2048, H=4, K=64, V=64),
    "wide": Shape(B=2, T=2048, H=8, K=128, V=128),
    "training": Shape(B=16, T=256, H=4, K=32, V=32),
}


def _random_keys(rng, shape):
    return rng.standard_normal((shape.B, shape.T, shape.H, shape.K))


def _one_key(rng, shape):
    """The same key at every token."""
    key = rng.standard_normal(shape.K)
    return np.broadcast_to(key, (shape.B, shape.T, shape.H, shape.K))


def _decay(*values):
    """Each log decay one of `values`, up to a tenth more."""
    return lambda rng, size: rng.choice(values, size) * rng.uniform(1, 1.1, size)


def _gate(rng, size):
    """Decays like a trained gate's: mostly near zero, now and then strong."""
    return -np.logaddexp(0, 2 * rng.standard_normal(size) - 2)


def _retention(rng, size):
    """RetNet's: one constant a head, from 1/32 down."""
    return np.broadcast_to(np.log(1 - 2.0 ** (-5 - np.arange(size[-1]))), size)


class Hard(NamedTuple):
    """The ways to draw keys and log decays; None for no decay."""

    keys: Callable
    g: Callable | None


HARD = {
    "gate": Hard(_random_keys, _gate),
    "retention": Hard(_random_keys, _retention),
    "no_decay": Hard(_random_keys, None),
    "one_key": Hard(_one_key, None),
    "one_key_gated": Hard(_one_key, _gate),
    "zero_decay": Hard(_random_keys, _decay(0.0)),
    "tiny_decay": Hard(_one_key, _decay(-1e-3, -1e-6)),
    "strong_decay": Hard(_random_keys, _decay(-1e2)),
    "vanishing_decay": Hard(_random_keys, _decay(-80.0, -20.0)),
    "extreme_decay": Hard(_random_keys, _decay(-1e4)),
    "mixed_decay": Hard(_random_keys, _decay(-1e4, -1e2, -3.0, *(-1e-3,) * 20)),
    "alternating_decay": Hard(_random_keys, _decay(-1e4, *(-1e-3,) * 30)),
    "resets": Hard(_random_keys, _decay(-np.inf, *(-1e-2,) * 30)),
    "frequent_resets": Hard(_random_keys, _decay(-np.inf, -1e-2)),
    "only_resets": Hard(_random_keys, _decay(-np.inf)),
}


def draw(
    name: str, shape: Shape, decay: str = "scalar", seed: int = 0
) -> dict[str, np.ndarray | None]:
    """The named hard input in float32, with the axes of `gated_linear_attention`.

    Args:
        decay: one of `DECAYS`: a head's, or every channel's own.

    Returns:
        q, k, v, g (or None), initial_state, and the gradients d_o and d_state of the
        two results.
    """
    rng = np.random.default_rng([seed, *name.encode()])
    hard = HARD[name]
    B, T, H, K, V = shape
    g_size = (B, T, H, K) if decay == "channel" else (B, T, H)
    inputs = {
        "q": rng.standard_normal((B, T, H, K)),
        "k": hard.keys(rng, shape),
        "v": rng.standard_normal((B, T, H, V)),
        "g": None if hard.g is None else hard.g(rng, g_size),
        "initial_state": rng.standard_normal((B, H, K, V)),
        "d_o": rng.standard_normal((B, T, H, V)),
        "d_state": rng.standard_normal((B, H, K, V)),
    }
    return {
        name: None if x is None else x.astype(np.float32) for name, x in inputs.items()
    }
