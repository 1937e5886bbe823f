"""The work of a ragged call: items of a few queries of one sequence, with their pages.

All sizes are known before compilation, but not how much is in use: the first `count`
items, in the order of the queries.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.paged_attention.operands import Operands


class Schedule(NamedTuple):
    """The items, and the place of each query's result.

    Attributes:
        count: the number of items; the entries after them repeat the last item.
        sequence: [W], the sequence of an item.
        row: [W], the index in q of an item's first query.
        position: [W], the position of an item's first query in its sequence.
        last: [W], the position of an item's last query in its sequence.
        first_page, end_page: [W], the part of the sequence's row of the page table that
          the item's queries see; at least one page.
        slot: [Tq], a query's place in the items: item * block_q + row of the item.
        has_keys: [Tq], whether the query is in an item and sees a key.
    """

    count: Int[Array, ""]
    sequence: Int[Array, "W"]
    row: Int[Array, "W"]
    position: Int[Array, "W"]
    last: Int[Array, "W"]
    first_page: Int[Array, "W"]
    end_page: Int[Array, "W"]
    slot: Int[Array, "Tq"]
    has_keys: Bool[Array, "Tq"]


def make(
    kv_lens: Int[Array, "S"],
    cu_q_lens: Int[Array, "S+1"],
    *,
    tokens: int,
    block_q: int,
    page: int,
    window: int | None,
) -> Schedule:
    """Divide the queries of every sequence that has keys into items of `block_q`.

    Args:
        tokens: Tq, at least 1.
    """
    S = kv_lens.shape[0]
    # The sum of ceil(q_len / block_q) over sequences is at most this.
    W = min(tokens, (tokens + S * (block_q - 1)) // block_q)
    q_lens = jnp.diff(cu_q_lens)
    items = jnp.where(kv_lens > 0, -(-q_lens // block_q), 0)
    ends = jnp.cumsum(items, dtype=jnp.int32)
    count = ends[-1]

    # If there are no items, the first entry is arbitrary, and so are its pages.
    w = jnp.minimum(jnp.arange(W, dtype=jnp.int32), jnp.maximum(count - 1, 0))
    sequence = jnp.minimum(_owner(ends, w), S - 1)
    first = (w - (ends - items)[sequence]) * block_q
    length = kv_lens[sequence]
    position = length - q_lens[sequence] + first
    last = jnp.minimum(position + block_q, length) - 1
    start = 0 if window is None else jnp.maximum(position - window + 1, 0)
    first_page = jnp.zeros_like(w) + start // page
    end_page = jnp.maximum(last // page, first_page) + 1

    t = jnp.arange(tokens, dtype=jnp.int32)
    s = jnp.minimum(_owner(cu_q_lens[1:], t), S - 1)
    i = t - cu_q_lens[s]
    slot = (ends - items)[s] * block_q + i
    has_keys = (t < cu_q_lens[-1]) & (kv_lens[s] - q_lens[s] + i >= 0)
    return Schedule(
        count=count,
        sequence=sequence,
        row=cu_q_lens[sequence] + first,
        position=position,
        last=last,
        first_page=first_page,
        end_page=end_page,
        slot=jnp.where(has_keys, slot, 0),
        has_keys=has_keys & (kv_lens[s] > 0),
    )


def _owner(ends: jax.Array, index: jax.Array) -> jax.Array:
    """The index of the run that contains `index`, for runs that end at `ends`."""
    return jnp.searchsorted(ends, index, side="right").astype(jnp.int32)


def fold(operands: Operands, schedule: Schedule, block_q: int) -> jax.Array:
    """The items' queries, grouped by the head of keys: [W, Hkv, G * block_q, D].

    Row g * block_q + i of a head is query i of the item. Rows past the item's last
    query have arbitrary queries.
    """
    (_, Hq, D), Hkv = operands.q.shape, operands.k_pages.shape[2]
    rows = schedule.row[:, None] + jnp.arange(block_q, dtype=jnp.int32)[None]
    q = operands.q.at[rows].get(mode="clip").reshape(-1, block_q, Hkv, Hq // Hkv, D)
    return q.transpose(0, 2, 3, 1, 4).reshape(-1, Hkv, Hq // Hkv * block_q, D)


def unfold(x: jax.Array, schedule: Schedule, block_q: int, otherwise) -> jax.Array:
    """The items' rows [W, Hkv, G * block_q, ...] to the queries' [Tq, Hq, ...].

    Queries without keys get `otherwise`.
    """
    W, Hkv, R, *rest = x.shape
    x = x.reshape(W, Hkv, R // block_q, block_q, *rest)
    x = jnp.moveaxis(x, 3, 1).reshape(W * block_q, -1, *rest)
    has_keys = schedule.has_keys.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.where(has_keys, x[schedule.slot], otherwise)
