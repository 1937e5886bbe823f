"""Gated linear attention in chunks: matrix products instead of a step per token.

Per head and chunk of C tokens, with incoming state S, and with the decayed scores P and
queries and keys Q~ and K~ of `scores.py`:

    S' = diag(gamma_C) S + K~^T V
    O  = Q~ S + P V

Only the sum for S' runs one chunk after the other; everything else is a batched product
over a group of chunks.

Reference: Yang et al., Gated Linear Attention Transformers, arXiv 2312.06635, section
4; Dao and Gu, Transformers are SSMs, arXiv 2405.21060, section 6.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import layout, streams
from pallas_kernels.linear_attention import block_sizes
from pallas_kernels.linear_attention.scores import Scores, score_gradients, scores
from pallas_kernels.products import Product, input_product


class Chunks(NamedTuple):
    """The operands, in chunks of C tokens."""

    q: Float[Array, "M B H C K"]
    k: Float[Array, "M B H C K"]
    v: Float[Array, "M B H C V"]
    g: Float[Array, "M B H C"] | Float[Array, "M B H C K"] | None


def chunked(
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
    """Run the chunked form; arguments and results as in `reference.token_recurrence`.

    Args:
        cu_seqlens: the start of each sequence and the end of the last one (B is 1);
          None for one sequence per batch row.
        chunk_size: tokens per chunk, at most T, rounded up to a power of two.
        precision: of the products with inputs and states; None takes HIGHEST for
          operands of 32 bits and more.
        empty: whether the states are zero; a single chunk does not read them then.
    """
    T = q.shape[1]
    if chunk_size is None:
        C = block_sizes.chunk_size(T, max(q.shape[-1], v.shape[-1]))
    else:
        C = layout.round_up_to_power_of_two(min(chunk_size, T))
    where = layout.arrange(T, C, q.shape[0] * q.shape[2] * C, cu_seqlens)
    chunks = jax.tree.map(lambda x: layout.by_token(x, where), Chunks(q, k, v, g))
    some_chunks = partial(attend, input_product((q, k, v), states.dtype, precision))
    if empty and T <= C and cu_seqlens is None:
        o, states = some_chunks(chunks, None, None)
    else:
        o, states = layout.in_groups(some_chunks, states, chunks, where)
    return layout.to_tokens(o, where, T), states


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    product: Product,
    chunks: Chunks,
    states: Float[Array, "S B H K V"] | None,
    sequence: Int[Array, "M"] | None,
) -> tuple[Float[Array, "M B H C V"], Float[Array, "S B H K V"]]:
    """Outputs and final states; chunk m reads and writes states[sequence[m]].

    Without states there is a single chunk, with a state of zeros before it.
    """
    return _forward(product, chunks, states, sequence)[0]


def _forward(product, chunks, states, sequence):
    q, k, v, g = chunks
    P, q_entry, k_exit, total = scores(product, q, k, g)
    added = product("mbhck,mbhcv->mbhkv", k_exit, v)
    o = product("mbhij,mbhjv->mbhiv", P, v)
    if states is None:
        return (o, added), (chunks, sequence, P, None)

    def chunk(S, operands):
        total, added = operands
        return total[..., None] * S + added, S

    states, S = streams.scan(chunk, states, (total, added), sequence)
    o += product("mbhck,mbhkv->mbhcv", q_entry, S)
    return (o, states), (chunks, sequence, P, S)


def _backward(product, residuals, gradients):
    """Gradients by hand.

    With dO and dS' given,
        dS = diag(gamma_C) dS' + Q~^T dO
    and then every other gradient is a batched product over the group:
        dP = dO V^T,   dQ~ = dO S^T,   dK~ = V dS'^T,   dV = P^T dO + K~ dS'
    """
    chunks, sequence, P, S = residuals
    dO, d_states = gradients
    q, k, v, g = chunks
    # Recomputed to save memory; the compiler drops P, which nothing uses.
    _, q_entry, k_exit, total = scores(product, q, k, g)
    if S is None:  # only the state after the chunk has a gradient
        d_states, dS_next = None, d_states
        d_q_entry = jnp.zeros(q.shape, product.result)
        d_total = jnp.zeros(dS_next.shape[:-1], product.result)
    else:
        added = product("mbhck,mbhcv->mbhkv", q_entry, dO)

        def chunk(dS_next, operands):
            total, added = operands
            return total[..., None] * dS_next + added, dS_next

        d_states, dS_next = streams.scan(
            chunk, d_states, (total, added), sequence, reverse=True
        )
        d_q_entry = product("mbhcv,mbhkv->mbhck", dO, S)
        d_total = jnp.sum(dS_next * S, -1)
    d_v = product("mbhij,mbhiv->mbhjv", P, dO)
    d_v += product("mbhck,mbhkv->mbhcv", k_exit, dS_next)
    d_scores = Scores(
        pairs=product("mbhiv,mbhjv->mbhij", dO, v),
        q=d_q_entry,
        k=product("mbhcv,mbhkv->mbhck", v, dS_next),
        total=d_total,
    )
    d_q, d_k, d_g = score_gradients(product, q, k, g, P, d_scores)
    d_chunks = Chunks(d_q, d_k, d_v, d_g)
    d_chunks = jax.tree.map(lambda d, x: d.astype(x.dtype), d_chunks, chunks)
    return d_chunks, d_states, None


attend.defvjp(_forward, _backward)
