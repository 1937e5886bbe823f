"""Streams of tokens: segments of a row, and sequences one after another in one row.

Padding becomes operands of zero, which leave every state unchanged; a reset becomes a
decay to exactly zero, g = -inf.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.segments import Segments, where


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def run(
    recurrence,
    axes,
    chunk_size,
    precision,
    scale,
    *,
    g,
    initial_state,
    segment_ids,
    cu_seqlens,
    **tokens,
):
    """Run a recurrence of matrix states over streams; scale and mask its outputs.

    Args:
        recurrence: called with `tokens`, g, the states [S, B, H, K, V] (S or B is one),
          cu_seqlens, chunk_size, precision and whether the states are known to be empty
          (zero); returns outputs [B, T, H, V] and states.
        axes: pairs of a name and its axes, a letter each.
        tokens: q [B, T, H, K], v [B, T, ..., V] and the other arrays over tokens.
        g: log decay [B, T, H] or [B, T, H, K], or None.
    """
    q, v = tokens["q"], tokens["v"]
    (B, T, H, K), V = q.shape, v.shape[-1]
    floats = [x for x in (*tokens.values(), g, initial_state) if x is not None]
    wide = any(x.dtype == jnp.float64 for x in floats)
    dtype = jnp.dtype("float64" if wide else "float32")

    axes = dict(axes)
    g = None if g is None else g.astype(dtype)
    kept, kept_axes = None, "BT"
    segments = None
    if segment_ids is not None:
        # A decay to zero, -inf, is a number like others.
        decay = {} if g is None else {"g": jnp.where(g == -jnp.inf, 0.0, g)}
        before = {} if initial_state is None else {"initial_state": initial_state}
        segments = Segments.of(
            segment_ids,
            [(axes[name], x) for name, x in (tokens | decay).items()],
            [(axes[name], x) for name, x in before.items()],
            axes="BTH",
        )
        kept, kept_axes = segments.sound, segments.axes
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.astype(jnp.int32)
        kept = inside(cu_seqlens, T)
    if kept is not None:

        def masked(name, x):
            return where(kept, kept_axes, x, axes[name], 0.0)

        tokens = {name: masked(name, x) for name, x in tokens.items()}
        g = None if g is None else masked("g", g)
    if segments is not None:
        g = jnp.zeros((B, T, H), dtype) if g is None else g
        g = where(~segments.reset, "BT", g, axes["g"], -jnp.inf)
        if initial_state is not None:
            initial_state = segments.state_before(initial_state, "BHKV")

    rows = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    empty = initial_state is None
    if initial_state is None:
        initial_state = jnp.zeros((rows, H, K, V), dtype)
    axis = 0 if cu_seqlens is None else 1
    states = opaque(jnp.expand_dims(initial_state.astype(dtype), axis))
    # States and values are the right operands of products.
    tokens["v"] = opaque(tokens["v"])
    states = vary_like(states, floats)
    tokens = {name: vary_like(x, floats) for name, x in tokens.items()}
    g = None if g is None else vary_like(g, floats)
    if T == 0:
        o = jnp.zeros((B, T, H, V), dtype)
    else:
        o, states = recurrence(
            **tokens,
            g=g,
            states=states,
            cu_seqlens=cu_seqlens,
            chunk_size=chunk_size,
            precision=precision,
            empty=empty,
        )
    o = o.astype(dtype) * jnp.asarray(K**-0.5 if scale is None else scale, dtype)
    states = jnp.squeeze(states, axis)
    if segments is not None:
        o = segments.outputs(o, "BTHV")
        states = segments.state_after(states, "BHKV")
    elif kept is not None:
        o = where(kept, kept_axes, o, "BTHV", 0.0)
    return o.astype(v.dtype), states


def scan(
    step,
    states: Float[Array, "S *state"],
    operands,
    sequence: Int[Array, " M"] | None,
    reverse: bool = False,
):
    """`jax.lax.scan` whose step m reads and writes states[sequence[m]].

    Args:
        step: maps a state and operands to the next state and an output.
        sequence: None if there is a single state.
    """

    def body(states, operands_and_sequence):
        operands, s = operands_and_sequence
        if s is None:
            state, output = step(states[0], operands)
            return state[None], output
        # The state is read before any is written, so that no step copies the states.
        state, states = jax.lax.optimization_barrier((states[s], states))
        state, output = step(state, operands)
        return states.at[s].set(state), output

    return jax.lax.scan(body, states, (operands, sequence), reverse=reverse)


def opaque(x: Array) -> Array:
    """Hide the values of x from the compiler.

    XLA for CPUs gives wrong products with a right operand that repeats one number if a
    reduction is fused with the product, as in ``jnp.sum(x @ jnp.ones((32, 32)), -1)``
    (tests/kernels/test_compiler.py). A state of zeros, also one from the caller, would
    be such an operand.
    """
    return jax.lax.optimization_barrier(x)


def vary_like(x: Array, arrays: list[Array]) -> Array:
    """Inside `jax.shard_map`, let x vary over the mesh axes that the arrays vary over.

    A loop's state must vary as its results do, even if it starts from zeros.
    """

    def varying(array):
        kind = jax.typeof(array)
        # Named `vma` until JAX 0.12.
        return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying

    axes = frozenset().union(*map(varying, arrays)) - varying(x)
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def inside(cu_seqlens: Int[Array, "S+1"], T: int) -> Bool[Array, "1 T"]:
    """Which of T tokens belong to a sequence."""
    t = jnp.arange(T, dtype=cu_seqlens.dtype)
    return ((t >= cu_seqlens[0]) & (t < cu_seqlens[-1]))[None]


def owner(cu_seqlens: Int[Array, "S+1"], T: int) -> Int[Array, " T"]:
    """The sequence of each of T tokens; the last one for tokens outside all."""
    t = jnp.arange(T, dtype=cu_seqlens.dtype)
    sequence = jnp.searchsorted(cu_seqlens[1:], t, side="right")
    return jnp.minimum(sequence, cu_seqlens.shape[0] - 2)
