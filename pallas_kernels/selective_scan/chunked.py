"""The selective scan in chunks that store only the states between them.

The recurrence runs token by token: every state of every channel has its own decay at
every token, so a chunk cannot be written as matrix products, and an associative scan
does log(C) times the work (measured five times as slow). Chunks save memory: the
forward pass stores the state before each chunk, [T / C, B, N, E] in all; the backward
pass recomputes the states of one chunk, [C, B, N, E], and their gradients before it
goes on to the previous chunk.

States are [N, E] here, so that sums over N add whole rows of channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import layout, streams
from pallas_kernels.products import EXACT
from pallas_kernels.selective_scan import block_sizes


class Tokens(NamedTuple):
    """The operands of M chunks of C tokens, with time first, to be scanned over."""

    x: Float[Array, "M C B E"]
    dt: Float[Array, "M C B E"]
    B: Float[Array, "M C B N"]
    C: Float[Array, "M C B N"]
    reset: Bool[Array, "M C B"] | None

    def astype(self, dtype):
        """Cast the numbers, but not the flags."""
        x, dt, B, C = (a.astype(dtype) for a in self[:4])
        return Tokens(x, dt, B, C, self.reset)


def chunked(
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
    """Run the chunked form; arguments and results as in `reference.token_recurrence`.

    Args:
        chunk_size: tokens per chunk; None for a tuned default.
    """
    rows, T, E = x.shape
    size = chunk_size or block_sizes.chunk_size(T, states[0].size)
    size = min(size, T)
    where = layout.arrange(T, size, rows * size * E, cu_seqlens)

    def by_time(a):
        """[B, T, ...] to [M, C, B, ...]."""
        a_MB1C = layout.by_token(a[:, :, None], where)
        return jnp.swapaxes(a_MB1C[:, :, 0], 1, 2)

    tokens = Tokens(
        x=by_time(x),
        dt=by_time(dt),
        B=by_time(B),
        C=by_time(C),
        reset=None if reset is None else by_time(reset),
    )
    y_MCBE, states = scan_chunks(
        tokens, A.T, jnp.swapaxes(states, 2, 3), where.sequence
    )
    y_MB1CE = jnp.swapaxes(y_MCBE, 1, 2)[:, :, None]
    y = layout.to_tokens(y_MB1CE, where, T)[:, :, 0]
    return y, jnp.swapaxes(states, 2, 3)


@jax.custom_vjp
def scan_chunks(
    tokens: Tokens,
    A: Float[Array, "N E"],
    states: Float[Array, "S B N E"],
    sequence: Int[Array, " M"] | None,
) -> tuple[Float[Array, "M C B E"], Float[Array, "S B N E"]]:
    """Outputs and final states; chunk m reads and writes states[sequence[m]]."""
    return _forward(tokens, A, states, sequence)[0]


def _decay(token, A):
    """exp(dt A), or zero where the state is reset: [B, N, E]."""
    decay = jnp.exp(token.dt[:, None] * A[None])
    if token.reset is None:
        return decay
    return jnp.where(token.reset[:, None, None], jnp.zeros((), A.dtype), decay)


def _next(h, token, A):
    """The state after a token."""
    added = (token.dt * token.x)[:, None] * token.B[..., None]
    return _decay(token, A) * h + added


def _forward(tokens, A, states, sequence):
    def chunk(start, tokens):
        def step(h, token):
            h = _next(h, token, A)
            return h, jnp.sum(h * token.C[..., None], axis=1)

        end, y = jax.lax.scan(step, start, tokens.astype(A.dtype))
        return end, (y, start)

    states, (y, starts) = streams.scan(chunk, states, tokens, sequence)
    return (y, states), (tokens, A, starts, sequence)


def _backward(residuals, gradients):
    """Gradients by the recurrence backwards, with dh_t the gradient for h_t:

        dh_t  = C_t dy_t + exp(dt_{t+1} A) dh_{t+1}
        dC_t  = sum over E of h_t dy_t,     dB_t = sum over E of dh_t dt_t x_t
        du_t  = sum over N of dh_t B_t      for the input u = dt x
        dl_t  = dh_t exp(dt_t A) h_{t-1}    for the exponent l = dt A

    from which the gradients for x, dt and A follow.
    """
    tokens, A, starts, sequence = residuals
    dy, d_states = gradients

    def chunk(d_end, operands):
        tokens, start, dy = operands
        tokens = tokens.astype(A.dtype)

        def step(h, token):
            h = _next(h, token, A)
            return h, h

        _, h = jax.lax.scan(step, start, tokens)
        h_before = jnp.concatenate([start[None], h[:-1]])

        def step_back(carry, operands):
            dh, dA = carry
            token, h_before, dy = operands
            dh = dh + token.C[..., None] * dy[:, None]
            du = jnp.sum(dh * token.B[..., None], axis=1)
            dh_before = _decay(token, A) * dh
            dl = dh_before * h_before
            d_dt = jnp.sum(dl * A[None], axis=1)
            return (dh_before, dA + dl * token.dt[:, None]), (dh, du, d_dt)

        zeros = jnp.zeros_like(d_end)
        (d_start, dA), (dh, du, d_dt) = jax.lax.scan(
            step_back, (d_end, zeros), (tokens, h_before, dy), reverse=True
        )
        u = tokens.dt * tokens.x
        d_tokens = Tokens(
            x=du * tokens.dt,
            dt=du * tokens.x + d_dt,
            B=jnp.einsum("cbne,cbe->cbn", dh, u, precision=EXACT),
            C=jnp.einsum("cbne,cbe->cbn", h, dy, precision=EXACT),
            reset=None,
        )
        return d_start, (d_tokens, dA)

    d_states, (d_tokens, dA_MBNE) = streams.scan(
        chunk, d_states, (tokens, starts, dy), sequence, reverse=True
    )
    d_tokens = Tokens(
        *(d.astype(a.dtype) for d, a in zip(d_tokens[:4], tokens[:4], strict=True)),
        reset=None,
    )
    return d_tokens, jnp.sum(dA_MBNE, axis=(0, 1)), d_states, None


scan_chunks.defvjp(_forward, _backward)
