"""The delta rule token by token: the definition, which other forms must match.

    S <- e^{g_t} S                                        once per token
    S <- S + beta_tn k_tn (v_tn - S^T k_tn)^T             for each step n
    o_t = S^T q_t

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
    k: Float[Array, "B T N H K"],
    v: Float[Array, "B T N H V"],
    beta: Float[Array, "B T N H"],
    g: Float[Array, "B T H"] | None,
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
          beta and g are zero for tokens outside. None for one sequence per batch row
          (S is 1).
        chunk_size, precision, empty: unused; there are no chunks, products are exact,
          and every state is read.

    Returns:
        The outputs before scaling and the states after the last token of each sequence.
    """
    del chunk_size, precision, empty
    dtype = states.dtype
    sequence = None if cu_seqlens is None else owner(cu_seqlens, q.shape[1])

    def step(S, token):
        q_BHK, k_BNHK, v_BNHV, beta_BNH, g_BH = token
        if g_BH is not None:
            S = jnp.exp(g_BH)[..., None, None] * S
        for n in range(k_BNHK.shape[1]):
            k_BHK, v_BHV, beta_BH = k_BNHK[:, n], v_BNHV[:, n], beta_BNH[:, n]
            error = v_BHV - jnp.einsum("bhkv,bhk->bhv", S, k_BHK, precision=EXACT)
            update = beta_BH[..., None] * error
            S = S + k_BHK[..., :, None] * update[..., None, :]
        o_BHV = jnp.einsum("bhkv,bhk->bhv", S, q_BHK, precision=EXACT)
        return S, o_BHV

    def by_token(x):
        return None if x is None else jnp.moveaxis(x, 1, 0).astype(dtype)

    tokens = tuple(map(by_token, (q, k, v, beta, g)))
    states, o_TBHV = scan(step, states, tokens, sequence)
    return jnp.moveaxis(o_TBHV, 0, 1), states
