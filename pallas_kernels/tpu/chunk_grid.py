"""The grid of a TPU kernel that carries a state from chunk to chunk of tokens.

It runs over batch rows, groups of heads and chunks, the chunks in order. The state is a
result whose block stays in VMEM as long as its index does: the kernel sets it where a
sequence begins, and it is written out where the next one does.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int


class ChunkGrid(NamedTuple):
    """A grid over B rows, H heads and M chunks.

    Attributes:
        heads: of a grid step.
        sequence: the state of each chunk; None for one a row.
        backward: from the last chunk to the first.
    """

    B: int
    H: int
    M: int
    heads: int
    sequence: Int[Array, " M"] | None = None
    backward: bool = False

    def tokens(self, rows: int, size: int) -> pl.BlockSpec:
        """A block of [B, M, rows, H size], a head's channels beside one another."""
        return self._of_chunk((rows, self.heads * size), axis=3)

    def rows(self, count: int, lanes: int) -> pl.BlockSpec:
        """A block of [B, M, count, H, lanes]."""
        return self._of_chunk((count, self.heads, lanes), axis=3)

    def stacked(self, rows: int, lanes: int) -> pl.BlockSpec:
        """A block of [B, M, groups of heads * rows, lanes]."""
        return self._of_chunk((rows, lanes), axis=2)

    def chunk_states(self, *size: int) -> pl.BlockSpec:
        """A block of [B, M, H, *size]."""
        return self._of_chunk((self.heads, *size), axis=2)

    def shared(self, rows: int, lanes: int) -> pl.BlockSpec:
        """A block of [B, M, rows, lanes], for all heads."""
        return self._of_chunk((rows, lanes), axis=None)

    def constant(self, *size: int) -> pl.BlockSpec:
        """A block of [H, *size], for all rows and chunks."""
        rest = (0,) * len(size)
        return pl.BlockSpec((self.heads, *size), lambda b, h, *_: (h, *rest))

    def states(self, *size: int) -> pl.BlockSpec:
        """A block of the states [S, H, *size], of the chunk's sequence or the row."""

        def index(b, h, step, *table):
            state = table[0][self._chunk(step)] if table else b
            return state, h, *(0 for _ in size)

        return pl.BlockSpec((None, self.heads, *size), index)

    def call(
        self,
        kernel: Callable,
        name: str,
        operands: Sequence[tuple[Array, pl.BlockSpec]],
        results: Sequence[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
        scratch: Sequence,
        vmem: int,
        flops: int,
        exponentials: int = 0,
    ) -> list[Array]:
        """Run the kernel; its first argument says whether a sequence begins.

        With `backward`, whether one ends.

        Args:
            vmem: bytes that the compiler may take.
            flops, exponentials: about how many a head and chunk take, for XLA's
              schedule of what surrounds the kernel.
        """
        table = () if self.sequence is None else (self.sequence.astype(jnp.int32),)

        def with_table(*refs):
            step = pl.program_id(2)
            begins = step == 0
            if table:
                of_chunk, *refs = refs
                before = self._chunk(jnp.maximum(step, 1) - 1)
                begins |= of_chunk[self._chunk(step)] != of_chunk[before]
            kernel(begins, *refs)

        arrays, in_specs = zip(*operands, strict=True)
        shapes, out_specs = zip(*results, strict=True)
        count = self.B * self.H * self.M
        return pl.pallas_call(
            with_table,
            name=name,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(table),
                grid=(self.B, self.H // self.heads, self.M),
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=scratch,
            ),
            out_shape=shapes,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=vmem,
            ),
            cost_estimate=pl.CostEstimate(
                flops=count * flops,
                bytes_accessed=sum(
                    x.size * x.dtype.itemsize for x in (*arrays, *shapes)
                ),
                transcendentals=count * exponentials,
            ),
        )(*table, *arrays)

    def _chunk(self, step):
        return self.M - 1 - step if self.backward else step

    def _of_chunk(self, block, axis):
        """A block of chunk m's, with the group of heads along an axis, or of all."""

        def index(b, h, step, *_):
            at = [b, self._chunk(step)] + [0] * len(block)
            if axis is not None:
                at[axis] = h
            return tuple(at)

        return pl.BlockSpec((None, None, *block), index)
