"""Softmax attention over the tokens of one document, whole or in a sliding window.

    o_t = sum_{s in [t-w+1, t]} softmax_s(q_t . k_s / sqrt(D)) v_s

With a window the cost is linear in the length: queries are taken in blocks, and each
block sees its own keys and the w - 1 keys before them. Scores and weights are float32.

Dimension key: B batch, T time, S slots of the cache, H query heads, G key heads, D head
size, C queries a block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxlab.layers import rows, segments

SMALLEST_BLOCK = 64  # queries; in shorter blocks the overhead prevails


@struct.dataclass
class KVCache:
    """The keys and values of one document, in a ring of S slots.

    Attributes:
        k, v: ``[B, S, G, D]``.
        position: int32 ``[B, S]``, the position of each slot's token; -1 if empty.
        length: int32 ``[B]``, tokens of the document so far.
    """

    k: Float[Array, "B S G D"]
    v: Float[Array, "B S G D"]
    position: Int[Array, "B S"]
    length: Int[Array, " B"]

    @property
    def max_length(self) -> int:
        """The number of slots."""
        return self.position.shape[1]


def init_cache(
    batch: int, slots: int, n_kv_heads: int, head_size: int, dtype: Any = jnp.float32
) -> KVCache:
    """Return an empty cache for the last `slots` tokens."""
    kv = jnp.zeros((batch, slots, n_kv_heads, head_size), dtype)
    return KVCache(
        k=kv,
        v=kv,
        position=jnp.full((batch, slots), -1, jnp.int32),
        length=jnp.zeros((batch,), jnp.int32),
    )


def attend(
    q_BTHD: Float[Array, "B T H D"],
    k_BSGD: Float[Array, "B S G D"],
    v_BSGD: Float[Array, "B S G D"],
    visible_BTS: Bool[Array, "B T S"],
) -> Float[Array, "B T H D"]:
    """Attend under any mask; ``H / G`` query heads share a head of keys and values.

    A query that sees nothing gets the mean of the values, not NaN.
    """
    B, T, _, D = q_BTHD.shape
    q_BTGRD = q_BTHD.reshape(B, T, k_BSGD.shape[2], -1, D)
    scores = jnp.einsum(
        "btgrd,bsgd->bgrts", q_BTGRD, k_BSGD, preferred_element_type=jnp.float32
    )
    fill = jnp.finfo(jnp.float32).min
    scores = jnp.where(visible_BTS[:, None, None], D**-0.5 * scores, fill)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSGD.dtype)
    return jnp.einsum("bgrts,bsgd->btgrd", weights, v_BSGD).reshape(q_BTHD.shape)


def softmax_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T G D"],
    v: Float[Array, "B T G D"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    *,
    window: int | None = None,
    cache: KVCache | None = None,
    block_size: int | None = None,
) -> tuple[Float[Array, "B T H D"], KVCache | None]:
    """Attend causally in packed rows that may continue from a cache.

    Args:
        q, k, v: queries, keys and values, already rotated where positions are used.
        segment_ids: from `segments.documents`.
        positions: from `segments.positions`, starting at the cache's length.
        window: tokens that a query sees, its own included; None: the whole document.
        cache: earlier tokens of the first document.
        block_size: queries in a block when there is a window; None: as many as the
            window spans, at least 64.

    Returns:
        Outputs (zero for padding), and the cache of the last document (None if no cache
        was given).
    """
    v = segments.without_padding(v, segment_ids)  # a weight of 0 is no defence
    if window is None:
        o = _whole(q, k, v, segment_ids, positions, cache)
    else:
        block = min(block_size or max(window, SMALLEST_BLOCK), q.shape[1])
        o = _windowed(q, k, v, segment_ids, window, cache, block)
    o = jnp.where(segments.real(segment_ids)[..., None, None], o, 0)
    if cache is None:
        return o, None
    return o, _store(cache, k, v, segment_ids, positions)


def softmax_attention_step(
    q: Float[Array, "B H D"],
    k: Float[Array, "B G D"],
    v: Float[Array, "B G D"],
    *,
    cache: KVCache,
    window: int | None = None,
) -> tuple[Float[Array, "B H D"], KVCache]:
    """Attend for one token: write its key and value, then read the cache."""
    row = jnp.arange(q.shape[0])
    slot = cache.length % cache.position.shape[1]
    cache = KVCache(
        k=cache.k.at[row, slot].set(k.astype(cache.k.dtype)),
        v=cache.v.at[row, slot].set(v.astype(cache.v.dtype)),
        position=cache.position.at[row, slot].set(cache.length),
        length=cache.length + 1,
    )
    visible = cache.position >= 0
    if window is not None:
        visible &= cache.length[:, None] - cache.position <= window
    keys, values = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
    return attend(q[:, None], keys, values, visible[:, None])[:, 0], cache


def _whole(q, k, v, ids, positions, cache: KVCache | None):
    """Attend to whole documents, by T x (S + T) scores."""
    index = jnp.arange(ids.shape[1])
    visible = (
        (ids[:, :, None] == ids[:, None, :])
        & segments.real(ids)[:, None, :]
        & (index[:, None] >= index[None, :])[None]
    )
    if cache is not None:
        continues = ids == segments.at(ids, segments.first_real(ids))[:, None]
        from_cache = continues[:, :, None] & (cache.position >= 0)[:, None, :]
        visible = jnp.concatenate([from_cache, visible], axis=2)
        k = jnp.concatenate([cache.k.astype(k.dtype), k], axis=1)
        v = jnp.concatenate([cache.v.astype(v.dtype), v], axis=1)
    return attend(q, k, v, visible)


def _windowed(q, k, v, ids, window: int, cache: KVCache | None, C: int):
    """Attend by a scan over blocks of C queries; it carries the w - 1 keys before each.

    The tokens of a document are contiguous, so their distance is the difference of
    their indices in the row. The backward pass computes each block again, so memory is
    linear in the length, too.
    """
    T, before = ids.shape[1], window - 1
    blocks = -(-T // C)

    def around(x, past, fill):
        """Put `past` just before the first real token; pad the end to whole blocks."""
        pad = ((0, 0), (before, blocks * C - T), *[(0, 0)] * (x.ndim - 2))
        x = jnp.pad(x, pad, constant_values=fill)
        if past is None:
            return x
        return rows.write(x, past.astype(x.dtype), segments.first_real(ids))

    past = (None, None, None) if cache is None else _newest(cache, ids, before)
    keys = [around(*args) for args in zip((k, v, ids), past, (0, 0, -1), strict=True)]
    queries = jnp.pad(q, ((0, 0), (0, blocks * C - T), (0, 0), (0, 0)))

    def in_blocks(x):
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, C, *x.shape[2:]), 1, 0)

    # Query i of a block has index before + i among the block's keys.
    behind = before + jnp.arange(C)[:, None] - jnp.arange(before + C)[None, :]
    near = (behind >= 0) & (behind < window)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(carry, xs):
        q, *new = xs
        k, v, key_ids = (
            jnp.concatenate(pair, axis=1) for pair in zip(carry, new, strict=True)
        )
        query_ids = key_ids[:, before:]
        visible = (
            near[None]
            & (query_ids[:, :, None] == key_ids[:, None, :])
            & segments.real(key_ids)[:, None, :]
        )
        return (k[:, C:], v[:, C:], key_ids[:, C:]), attend(q, k, v, visible)

    carry = tuple(x[:, :before] for x in keys)
    xs = (in_blocks(queries), *(in_blocks(x[:, before:]) for x in keys))
    _, o = jax.lax.scan(block, carry, xs)
    return jnp.moveaxis(o, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, :T]


def _newest(cache: KVCache, ids, count: int):
    """Read the first document's last `count` keys, values and ids, oldest first."""
    place = cache.length[:, None] - count + jnp.arange(count)[None]
    slot = (place % cache.position.shape[1])[..., None, None]
    held = jnp.take_along_axis(cache.position, slot[..., 0, 0], axis=1) == place
    first_id = segments.at(ids, segments.first_real(ids))[:, None]
    return (
        jnp.take_along_axis(cache.k, slot, axis=1),
        jnp.take_along_axis(cache.v, slot, axis=1),
        jnp.where(held & (place >= 0), first_id, segments.PADDING),
    )


def _store(cache: KVCache, k, v, ids, positions) -> KVCache:
    """Store the newest tokens of the last document; forget any other document."""
    slots = cache.position.shape[1]
    last_id = segments.at(ids, segments.end_real(ids) - 1)
    none_real = last_id < 0
    length = jnp.where(
        none_real,
        cache.length,
        1 + jnp.max(jnp.where(ids == last_id[:, None], positions, -1), axis=1),
    )
    replaced = last_id != segments.at(ids, segments.first_real(ids))
    kept = jnp.where((replaced & ~none_real)[:, None], -1, cache.position)
    newest = (
        (ids == last_id[:, None])
        & segments.real(ids)
        & (positions >= length[:, None] - slots)
    )
    # Slot S is out of range, so what is written there is dropped.
    slot = jnp.where(newest, positions % slots, slots)
    row = jnp.arange(ids.shape[0])[:, None]
    return KVCache(
        k=cache.k.at[row, slot].set(k.astype(cache.k.dtype), mode="drop"),
        v=cache.v.at[row, slot].set(v.astype(cache.v.dtype), mode="drop"),
        position=kept.at[row, slot].set(positions, mode="drop"),
        length=length,
    )
