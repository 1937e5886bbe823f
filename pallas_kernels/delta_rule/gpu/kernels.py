"""The delta rule's states from chunk to chunk as Mosaic GPU kernels, for Hopper.

Everything that needs no state is computed before, for all chunks at once
(`chunked.prepare`). The rest runs one chunk after another: a block of four warps keeps
the transposed state S [64, K] of a row, a head and 64 channels of the values in its
registers, and computes for every chunk of KEYS keys and C tokens

    U  = U0 - S W^T                          [64, KEYS]
    O  = S Q^T + U P^T                       [64, C]
    S' = total S + U E                       [64, K]

and for the gradient, from the last chunk to the first,

    dU = dU0 + dS' E^T                       [64, KEYS]
    dS = total dS' + dO Q - dU W             [64, K]

where Q is diag(gamma) Q and E is diag(epsilon) K of `chunked`. The matrix units take
bfloat16 operands from shared memory and accumulate in float32; the state itself is
never rounded. Everything is transposed so that the 64 rows that a product must have are
channels, not tokens, of which a chunk has fewer if each has several keys.

A repeated key is multiplied by the same rounded W each time, and the error adds up
along a row. So the factors that the chunked form multiplies in float32, W and for the
gradient dU, are in two bfloat16 parts each, and the results for the gradient are
float32. Only the other factor of W, S, is in one part: it is rounded differently each
time.

The operands of the next chunk are copied while the current one is computed.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.delta_rule.gpu.sizes import CHANNELS, KEYS
from pallas_kernels.gpu.tiles import product

SLOTS = 2  # chunks with operands in shared memory


class Chunks(NamedTuple):
    """Operands of all chunks [Z, ...], ordered by chunk, then row, then head.

    Attributes:
        W: W, rounded to bfloat16.
        W_rest: W less its rounded value.
        E: diag(epsilon) K.
        Q: diag(gamma) Q.
        total: the decay of each chunk; None for no decay.
        rows: number of batch rows.
        heads: H.
        bounds: the first chunk of each sequence of a single row, and the end of the
          last; None if every row is a sequence.
    """

    W: Float[Array, "Z KEYS K"]
    W_rest: Float[Array, "Z KEYS K"]
    E: Float[Array, "Z KEYS K"]
    Q: Float[Array, "Z C K"]
    total: Float[Array, "Z"] | None
    rows: int
    heads: int
    bounds: Int[Array, "S+1"] | None


def forward(
    chunks: Chunks,
    P: Float[Array, "Z C KEYS"],
    U0: Float[Array, "Z V KEYS"],
    states: Float[Array, "S V K"],
    save: bool,
) -> list[Array]:
    """Run the chunks; results of chunks outside all sequences are not written.

    Args:
        states: initial state of each sequence and head, heads innermost.
        save: whether to return what the gradient needs too.

    Returns:
        Final states like `states`, with `save` the states before each chunk [Z, V, K],
        O [Z, V, C] in bfloat16, and with `save` U [Z, V, KEYS].
    """

    def chunk(operands, results, tiles, S, total, wait):
        W, W_rest, E, Q, P, U0 = operands
        S_tile, U_tile = tiles
        O_out, *U_out = results
        _store((S_tile, S))
        wait()
        U = U0[...] - product((S_tile, W.T), (S_tile, W_rest.T))
        _store((U_tile, U), *((out, U) for out in U_out))
        _store((O_out, product((S_tile, Q.T), (U_tile, P.T))))
        return _shrunk(S, total) + product((U_tile, E))

    C, K = chunks.Q.shape[1:]
    token_operands = (*_shared(chunks), P)
    return _run(
        "delta_rule_forward",
        chunk,
        chunks,
        operands=[(x, False) for x in token_operands] + [(U0, True)],
        results=[(C, jnp.bfloat16), *([(KEYS, jnp.float32)] if save else [])],
        tiles=[K, KEYS],
        states=states,
        save=save,
        reverse=False,
    )


def backward(
    chunks: Chunks,
    d_O: Float[Array, "Z V C"],
    d_U0: Float[Array, "Z V KEYS"],
    d_states: Float[Array, "S V K"],
) -> list[Array]:
    """Run the chunks backwards; `chunks` has -W instead of W.

    Returns:
        Gradients in float32: for the initial states like `d_states`, for the states
        after each chunk [Z, V, K], and for U [Z, V, KEYS].
    """

    def chunk(operands, results, tiles, dS, total, wait):
        W, W_rest, E, Q, dO, dU0 = operands
        (dU_out,) = results
        dS_tile, coarse, fine = tiles
        _store((dS_tile, dS))
        wait()
        dU = dU0[...] + product((dS_tile, E.T))
        rest = dU - dU.astype(coarse.dtype).astype(dU.dtype)
        _store((coarse, dU), (fine, rest), (dU_out, dU))
        added = product((dO, Q), (coarse, W), (fine, W), (coarse, W_rest))
        return _shrunk(dS, total) + added

    return _run(
        "delta_rule_backward",
        chunk,
        chunks,
        operands=[(x, False) for x in _shared(chunks)]
        + [(x, True) for x in (d_O, d_U0)],
        results=[(KEYS, jnp.float32)],
        tiles=[chunks.W.shape[2], KEYS, KEYS],
        states=d_states,
        save=True,
        reverse=True,
    )


def _shared(chunks: Chunks) -> tuple[Array, ...]:
    """The operands of both kernels."""
    return chunks.W, chunks.W_rest, chunks.E, chunks.Q


def _run(
    name: str,
    chunk: Callable,
    chunks: Chunks,
    *,
    operands: Sequence[tuple[Array, bool]],
    results: Sequence[tuple[int, jax.typing.DTypeLike]],
    tiles: Sequence[int],
    states: Float[Array, "S V K"],
    save: bool,
    reverse: bool,
) -> list[Array]:
    """Carry the states over all chunks, with a block for each sequence.

    Args:
        chunk: maps the operands, the results, the tiles, the state, its factor and a
          function that waits for the operands to the next state.
        operands: arrays [Z, rows, columns], and whether their rows are channels.
        results: columns and dtype of what a chunk writes; the rows are channels.
        tiles: columns of the bfloat16 tiles for a chunk's left factors.
        save: whether to return the state that each chunk starts with.

    Returns:
        The final states, the saved ones [Z, V, K], and the results.
    """
    _, V, K = states.shape
    Z = operands[0][0].shape[0]
    M = Z // (chunks.rows * chunks.heads)
    scalars = [x for x in (chunks.total, chunks.bounds) if x is not None]

    def body(states_ref, *refs):
        n = len(operands)
        in_refs, refs = refs[:n], list(refs[n:])
        total_ref = None if chunks.total is None else refs.pop(0)
        bounds_ref = None if chunks.bounds is None else refs.pop(0)
        final_ref = refs.pop(0)
        saved_ref = refs.pop(0) if save else None
        *out_refs, in_slots, out_tiles, factor_tiles, arrived = refs

        sequence, head = jax.lax.axis_index("sequences"), jax.lax.axis_index("heads")
        channels = pl.ds(jax.lax.axis_index("channels") * CHANNELS, CHANNELS)
        first, last, row = 0, M, sequence
        if bounds_ref is not None:
            first, last, row = bounds_ref[sequence], bounds_ref[sequence + 1], 0

        def place(i):
            m = last - 1 - i if reverse else first + i
            return (m * chunks.rows + row) * chunks.heads + head

        def load(i):
            slot = jax.lax.rem(i, SLOTS)
            for (_, by_channel), ref, tile in zip(
                operands, in_refs, in_slots, strict=True
            ):
                source = ref.at[place(i), channels] if by_channel else ref.at[place(i)]
                plgpu.copy_gmem_to_smem(source, tile.at[slot], arrived.at[slot])

        def step(i, S):
            slot = jax.lax.rem(i, SLOTS)
            total = None if total_ref is None else total_ref[place(i)]
            if saved_ref is not None:  # directly, since shared memory has no room
                saved_ref[place(i), channels] = S
            # The previous chunk's results must have been copied from their tiles.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            S = chunk(
                [tile.at[slot] for tile in in_slots],
                out_tiles,
                factor_tiles,
                S,
                total,
                lambda: plgpu.barrier_wait(arrived.at[slot]),
            )
            for tile, ref in zip(out_tiles, out_refs, strict=True):
                plgpu.copy_smem_to_gmem(tile, ref.at[place(i), channels])
            # A copy starts once all four warps are here, so none still reads the slot.
            pl.when(i + SLOTS < last - first)(lambda: load(i + SLOTS))
            return S

        for i in range(SLOTS):
            pl.when(i < last - first)(lambda i=i: load(jnp.int32(i)))
        state = sequence * chunks.heads + head
        # Once per sequence; an "optimized" load would be from shared memory.
        S = plgpu.load(states_ref.at[state, channels], optimized=False)
        S = plgpu.layout_cast(S, plgpu.Layout.WGMMA)
        final_ref[state, channels] = jax.lax.fori_loop(0, last - first, step, S)
        plgpu.wait_smem_to_gmem(0)

    def slots(x, by_channel):
        rows = CHANNELS if by_channel else x.shape[1]
        return plgpu.SMEM((SLOTS, rows, x.shape[2]), x.dtype)

    out_type = [jax.ShapeDtypeStruct(states.shape, jnp.float32)]
    if save:
        out_type.append(jax.ShapeDtypeStruct((Z, V, K), jnp.float32))
    out_type += [jax.ShapeDtypeStruct((Z, V, n), dtype) for n, dtype in results]
    return plgpu.kernel(
        body,
        out_type=out_type,
        # Only the last may be above 65,535.
        grid=(V // CHANNELS, chunks.heads, states.shape[0] // chunks.heads),
        grid_names=("channels", "heads", "sequences"),
        kernel_name=name,
        # The default from JAX 0.12 on: the compiler chooses layouts and swizzles.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        scratch_types=[
            [slots(*operand) for operand in operands],
            [plgpu.SMEM((CHANNELS, n), dtype) for n, dtype in results],
            [plgpu.SMEM((CHANNELS, n), jnp.bfloat16) for n in tiles],
            plgpu.Barrier(num_arrivals=len(operands), num_barriers=SLOTS),
        ],
    )(states, *(x for x, _ in operands), *scalars)


def _store(*pairs) -> None:
    """Write arrays to tiles, for the products and copies that follow."""
    for tile, x in pairs:
        tile[...] = x.astype(tile.dtype)
    plgpu.commit_smem()


def _shrunk(S: Array, total: Array | None) -> Array:
    return S if total is None else total * S
