"""Pieces of Mosaic GPU kernels; operands of products are tiles of shared memory."""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float


def product(*pairs) -> Float[Array, "rows columns"]:
    """The sum of the products of pairs of tiles, accumulated in float32."""

    def multiply(accumulator):
        for x, y in pairs:
            plgpu.wgmma(accumulator, x, y)
        return accumulator[...]

    shape = pairs[0][0].shape[0], pairs[0][1].shape[1]
    accumulator = plgpu.WGMMAAccumulatorRef(shape, jnp.float32)
    return pl.run_scoped(multiply, accumulator)
