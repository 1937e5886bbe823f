"""The selective scan token by token: the definition, which other forms must match.

    h <- exp(dt_t A) h + dt_t x_t B_t^T,   y_t = h C_t

Everything is computed in the accumulation type (float32, or float64 for float64
inputs).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import streams
from pallas_kernels.products import EXACT


def token_recurrence(
    x: Float[Array, "B T E"],
    dt: Float[Array, "B T E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    reset: Bool[Array, "B T"] | None,
    states: Float[Array, "S B E N"],
    cu_seqlens: Int[Array, "S+1"] | None,
    chunk_size: int | None,
) -> tuple[Float[Array, "B T E"], Float[Array, "S B E N"]]:
    """Run the recurrence.

    Args:
        reset: whether the state is zeroed before each token; None for never.
        states: the state of each sequence before its first token.
        cu_seqlens: the start of each sequence and the end of the last one (B is 1); x
          and dt are zero for tokens outside. None for one sequence per batch row (S is
          1).
        chunk_size: unused; there are no chunks.

    Returns:
        The outputs without D x and the states after the last token of each sequence.
    """
    del chunk_size
    dtype = states.dtype
    sequence = None if cu_seqlens is None else streams.owner(cu_seqlens, x.shape[1])

    def step(h, token):
        x_BE, dt_BE, B_BN, C_BN, reset_B = token
        decay = jnp.exp(dt_BE[..., None] * A[None])
        if reset_B is not None:
            decay = jnp.where(reset_B[:, None, None], jnp.zeros((), dtype), decay)
        h = decay * h + (dt_BE * x_BE)[..., None] * B_BN[:, None]
        return h, jnp.einsum("ben,bn->be", h, C_BN, precision=EXACT)

    def by_time(a):
        return None if a is None else jnp.moveaxis(a, 1, 0)

    numbers = (by_time(a.astype(dtype)) for a in (x, dt, B, C))
    tokens = (*numbers, by_time(reset))
    states, y_TBE = streams.scan(step, states, tokens, sequence)
    return jnp.moveaxis(y_TBE, 0, 1), states
