"""Gated linear attention token by token: the definition.

    S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T
    o_t = S_t^T q_t

Everything is computed in the accumulation type (float32, or float64 for float64
inputs).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.products import EXACT
from pallas_kernels.streams import owner, scan


def token_recurrence(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    g: Float[Array, "B T H"] | Float[Array, "B T H K"] | None,
    states: Float[Array, "S B H K V"],
    cu_seqlens: Int[Array, "S+1"] | None,
    chunk_size: int | None,
    precision: jax.lax.Precision | None,
    empty: bool,
) -> tuple[Float[Array, "B T H V"], Float[Array, "S B H K V"]]:
    """Run the recurrence.

    Args:
        states: the state of each sequence before its first token.
        cu_seqlens: the start of each sequence and the end of the last one (B is 1);
          k and g are zero for tokens outside. None for one sequence per batch row (S
          is 1).
        chunk_size, precision, empty: unused; there are no chunks, products are exact,
          and every state is read.

    Returns:
        The outputs before scaling and the states after the last token of each sequence.
    """
    del chunk_size, precision, empty
    sequence = None if cu_seqlens is None else owner(cu_seqlens, q.shape[1])

    def step(S, token):
        q_BHK, k_BHK, v_BHV, g_BHK = token
        if g_BHK is not None:  # [B, H, K], or [B, H, 1] for all channels
            S = jnp.exp(g_BHK)[..., None] * S
        S = S + k_BHK[..., :, None] * v_BHV[..., None, :]
        return S, jnp.einsum("bhkv,bhk->bhv", S, q_BHK, precision=EXACT)

    def by_token(x):
        return None if x is None else jnp.moveaxis(x, 1, 0).astype(states.dtype)

    if g is not None and g.ndim == 3:
        g = g[..., None]
    tokens = tuple(map(by_token, (q, k, v, g)))
    states, o_TBHV = scan(step, states, tokens, sequence)
    return jnp.moveaxis(o_TBHV, 0, 1), states
