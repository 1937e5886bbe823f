"""The delta rule's GPU kernels as one operation with a gradient.

Everything that needs no state is plain JAX, shared with the chunked form: the systems
of all chunks before the forward kernel, and after the backward one all gradients except
those for U and the states.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import layout, partition
from pallas_kernels.delta_rule import chunked
from pallas_kernels.delta_rule.gpu import kernels
from pallas_kernels.delta_rule.gpu.sizes import KEYS, LEAST_TOKENS, chunk_tokens
from pallas_kernels.products import EXACT, Product

PRODUCTS = chunked.Products(
    inputs=Product(jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32), None),
    solution=Product(jnp.dtype(jnp.float32), jnp.dtype(jnp.float32), EXACT),
)


def fused(
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
    """Run the kernels; arguments and results as in `reference.token_recurrence`.

    The outputs are bfloat16, like q, k and v. Products of bfloat16 are exact with every
    `precision`. The caller checks the arguments with `unsupported`.
    """
    del chunk_size, precision, empty
    run = partition.divided(
        _fused,
        ("BTHK", "BTNHK", "BTNHV", "BTNH", "BTH", "SBHKV", "S"),
        ("BTHV", "SBHKV"),
    )
    return run(q, k, v, beta, g, states, cu_seqlens)


def _fused(q, k, v, beta, g, states, cu_seqlens):
    T, N = k.shape[1:3]
    where = layout.arrange(T, chunk_tokens(N), None, cu_seqlens)
    chunks = chunked.Chunks(
        q=layout.by_token(q, where),
        k=layout.by_key(k, where),
        v=layout.by_key(v, where),
        beta=layout.by_key(beta.astype(jnp.float32), where),
        g=None if g is None else layout.by_token(g, where),
    )
    bounds = None
    if cu_seqlens is not None:
        bounds = layout.chunk_bounds(cu_seqlens, where.chunk_size)
    o, states = _delta_chunks(chunks, states, bounds)
    return layout.to_tokens(o, where, T), states


@jax.custom_vjp
def _delta_chunks(
    chunks: chunked.Chunks,
    states: Float[Array, "S B H K V"],
    bounds: Int[Array, "S+1"] | None,
) -> tuple[Float[Array, "M B H C V"], Float[Array, "S B H K V"]]:
    """Outputs and final states; sequence s has chunks bounds[s] to bounds[s + 1]."""
    return _run(chunks, states, bounds, save=False)[0]


def _forward(chunks, states, bounds):
    results, saved = _run(chunks, states, bounds, save=True)
    return results, (chunks, bounds, saved)


def _run(chunks, states, bounds, save):
    (M, B, H, C, _), V = chunks.q.shape, chunks.v.shape[-1]
    prepared = chunked.prepare(PRODUCTS, chunks)
    final, *results = kernels.forward(
        _operands(chunks, prepared, bounds),
        _padded(_flat(prepared.P), LEAST_TOKENS, KEYS).astype(jnp.bfloat16),
        _padded(_transposed(prepared.U0), V, KEYS),
        _transposed(states),
        save,
    )
    o = results.pop(1 if save else 0)
    o = jnp.swapaxes(o[..., :C].reshape(M, B, H, V, C), -1, -2)
    return (o, _states(final, states)), results


def _backward(residuals, gradients):
    chunks, bounds, (S, U) = residuals
    d_o, d_final = gradients
    M, B, H, NC, K = chunks.k.shape
    V = chunks.v.shape[-1]
    prepared = chunked.prepare(PRODUCTS, chunks)
    d_U0 = PRODUCTS.inputs("mbhcn,mbhcv->mbhnv", prepared.P, d_o)
    operands = _operands(chunks, prepared, bounds)
    d_states, d_S, d_U = kernels.backward(
        operands._replace(W=-operands.W, W_rest=-operands.W_rest),
        _padded(_transposed(d_o), V, LEAST_TOKENS).astype(jnp.bfloat16),
        _padded(_transposed(d_U0), V, KEYS),
        _transposed(d_final),
    )

    def to_chunks(x, columns):
        x = x[..., :columns].reshape(M, B, H, V, columns)
        return jnp.swapaxes(x, -1, -2)

    d_chunks = chunked.chunk_gradients(
        PRODUCTS,
        chunks,
        prepared,
        to_chunks(U, NC),
        to_chunks(S, K),
        d_o.astype(jnp.float32),
        to_chunks(d_U, NC),
        to_chunks(d_S, K),
    )
    return d_chunks, _states(d_states, d_final), None


_delta_chunks.defvjp(_forward, _backward)


def _operands(chunks, prepared, bounds) -> kernels.Chunks:
    """The operands of both kernels, with zeros for missing keys and tokens."""
    _, B, H, _, K = chunks.q.shape
    factors = prepared.factors
    Q = chunked.scaled(chunks.q.astype(jnp.float32), factors.entry)
    W = _padded(_flat(prepared.W), KEYS, K)
    # XLA may remove a cast to bfloat16 and back, and with it the rest.
    W_rounded = jax.lax.reduce_precision(W, exponent_bits=8, mantissa_bits=7)
    E = _padded(_flat(chunked.exit_keys(chunks, factors)), KEYS, K)
    return kernels.Chunks(
        W=W_rounded.astype(jnp.bfloat16),
        W_rest=(W - W_rounded).astype(jnp.bfloat16),
        E=E.astype(jnp.bfloat16),
        Q=_padded(_flat(Q), LEAST_TOKENS, K).astype(jnp.bfloat16),
        total=None if factors.total is None else factors.total.reshape(-1),
        rows=B,
        heads=H,
        bounds=bounds,
    )


def _flat(x: Float[Array, "M B H rows columns"]) -> Float[Array, "Z rows columns"]:
    return x.reshape(-1, *x.shape[-2:])


def _transposed(x: Float[Array, "M B H rows columns"]) -> Array:
    """[Z, columns, rows]."""
    return jnp.swapaxes(_flat(x), -1, -2)


def _states(x: Float[Array, "SBH V K"], like: Array) -> Float[Array, "S B H K V"]:
    return jnp.swapaxes(x, -1, -2).reshape(like.shape)


def _padded(x: Float[Array, "Z rows columns"], rows: int, columns: int) -> Array:
    """Pad x with zeros to at least `rows` rows and `columns` columns."""
    _, x_rows, x_columns = x.shape
    padding = (0, max(0, rows - x_rows)), (0, max(0, columns - x_columns))
    return jnp.pad(x, ((0, 0), *padding))
