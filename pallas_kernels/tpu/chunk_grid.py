"""The grid of a TPU kernel that carries a state from chunk to chunk of tokens.

It runs over batch rows, groups of heads and chunks, the chunks in order. The state is a
result whose block stays in VMEM as long as its index stays the same: the kernel sets it
when a sequence begins, and it is written to HBM when the next one begins.
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
        heads: heads in a grid step.
        sequence: index of each chunk's state; None for one state per row.
        backward: whether to go from the last chunk to the first.
    """

    B: int
    H: int
    M: int
    heads: int
    sequence: Int[Array, " M"] | None = None
    backward: bool = False

    def tokens(self, rows: int, size: int) -> pl.BlockSpec:
        """A block of [B, M, rows, H size], with the channels of a head adjacent."""
        return self._chunk_block((rows, self.heads * size), axis=3)

    def rows(self, count: int, lanes: int) -> pl.BlockSpec:
        """A block of [B, M, count, H, lanes]."""
        return self._chunk_block((count, self.heads, lanes), axis=3)

    def stacked(self, rows: int, lanes: int) -> pl.BlockSpec:
        """A block of [B, M, groups of heads * rows, lanes]."""
        return self._chunk_block((rows, lanes), axis=2)

    def chunk_states(self, *size: int) -> pl.BlockSpec:
        """A block of [B, M, H, *size]."""
        return self._chunk_block((self.heads, *size), axis=2)

    def shared(self, rows: int, lanes: int) -> pl.BlockSpec:
        """A block of [B, M, rows, lanes], for all heads."""
        return self._chunk_block((rows, lanes), axis=None)

    def constant(self, *size: int) -> pl.BlockSpec:
        """A block of [H, *size], for all rows and chunks."""
        rest = (0,) * len(size)
        return pl.BlockSpec((self.heads, *size), lambda b, h, *_: (h, *rest))

    def states(self, *size: int) -> pl.BlockSpec:
        """A block of the states [S, H, *size], for the chunk's sequence or its row."""

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
        """Run the kernel; its first argument is whether a sequence begins here.

        With `backward`, it is whether a sequence ends here.

        Args:
            vmem: bytes that the compiler may use.
            flops, exponentials: rough numbers per head and chunk, by which XLA
              schedules the operations around the kernel.
        """
        table = () if self.sequence is None else (self.sequence.astype(jnp.int32),)

        def with_table(*refs):
            step = pl.program_id(2)
            begins = step == 0
            if table:
                sequence, *refs = refs
                before = self._chunk(jnp.maximum(step, 1) - 1)
                begins |= sequence[self._chunk(step)] != sequence[before]
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

    def _chunk_block(self, block, axis):
        """A block of one chunk: its group of heads along `axis`, or all heads."""

        def index(b, h, step, *_):
            indices = [b, self._chunk(step)] + [0] * len(block)
            if axis is not None:
                indices[axis] = h
            return tuple(indices)

        return pl.BlockSpec((None, None, *block), index)
