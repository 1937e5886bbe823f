"""Programs of the kernels to compile ahead of time, by name; see `aot`.

Each returns a function and the `jax.ShapeDtypeStruct` of its arguments. Heads and their
channels come as one axis, as a model's projections make them, so that a kernel's share
of the layout is compiled with it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.delta_rule import delta_product

Program = tuple[Callable, tuple[jax.ShapeDtypeStruct, ...]]


def delta_rule(
    T: int,
    H: int = 16,
    K: int = 128,
    V: int = 128,
    N: int = 1,
    B: int = 1,
    dtype: str = "bfloat16",
    gated: bool = True,
) -> Program:
    """The delta rule, N steps a token."""

    def forward(q, k, v, beta, g):
        o, state = delta_product(
            q.reshape(B, T, H, K),
            k.reshape(B, T, N, H, K),
            v.reshape(B, T, N, H, V),
            beta,
            g if gated else None,
            implementation="pallas_tpu",
        )
        return o.reshape(B, T, H * V), state

    shapes = (
        jax.ShapeDtypeStruct((B, T, H * K), dtype),
        jax.ShapeDtypeStruct((B, T * N, H * K), dtype),
        jax.ShapeDtypeStruct((B, T * N, H * V), dtype),
        jax.ShapeDtypeStruct((B, T, N, H), jnp.float32),
        jax.ShapeDtypeStruct((B, T, H), jnp.float32),
    )
    return forward, shapes
