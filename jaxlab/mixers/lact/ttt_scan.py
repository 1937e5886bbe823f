"""Test-time training over sequences: a scan over large chunks, documents, decoding.

`fast_weights` takes the step of one chunk. This module says which tokens make a chunk
and which weights a token is read with:

| order | tokens of chunk c are read with the weights after | causal |
|---|---|---|
| ``apply_update`` | chunks < c | by token |
| ``update_apply`` | chunks <= c | by chunk |
| ``update_all`` | all chunks | no |
| ``strided`` | the chosen tokens of chunks <= c, which alone write | by chunk |

Reference: Zhang et al., "Test-Time Training Done Right", arXiv 2505.23884, section 3.2.

Dimension key: B batch, T time, H heads, D head size, F hidden size, C tokens a chunk, M
chunks.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxlab.layers import rows, segments
from jaxlab.mixers.lact.fast_weights import FastWeights, Rule, apply, update, used
from jaxlab.params import constrain

MUON = Rule()
ORDERS = ("apply_update", "update_apply", "update_all", "strided")


@struct.dataclass
class FastState:
    """The decoding state of the fast weights.

    Slots of the open chunk past `filled` are zero. A row that is lost, because its
    document holds NaN, is NaN throughout.

    Attributes:
        change: float32, the weights minus the initial ones; under the norm placement
            "pre", the sum before it is rescaled minus the initial weights.
        velocity: float32; None without momentum.
        k, v: keys and values of the open chunk, ``[B, C, H, D]``.
        eta: its rates, float32 ``[B, C, H, 3]``.
        momentum: float32 ``[B, C, H]``; None without momentum.
        filled: int32 ``[B]``, the number of tokens in the open chunk, below C.
    """

    change: FastWeights
    velocity: FastWeights | None
    k: Float[Array, "B C H D"]
    v: Float[Array, "B C H D"]
    eta: Float[Array, "B C H 3"]
    momentum: Float[Array, "B C H"] | None
    filled: Int[Array, " B"]


def init_fast_state(
    initial: FastWeights,
    batch: int,
    chunk_size: int,
    *,
    momentum: bool,
    dtype: Any = jnp.float32,
) -> FastState:
    """Return the state before the first token.

    Args:
        initial: arrays or abstract arrays; only their shapes matter.
        batch: rows.
        chunk_size: C.
        momentum: whether the update has momentum.
        dtype: of the open chunk's keys and values.
    """
    H, D, _ = initial.gate.shape

    def zeros(*shape):
        return jnp.zeros((batch, *shape), jnp.float32)

    weights = jax.tree.map(lambda w: zeros(*w.shape), initial)
    kv = zeros(chunk_size, H, D).astype(dtype)
    return FastState(
        change=weights,
        velocity=weights if momentum else None,
        k=kv,
        v=kv,
        eta=zeros(chunk_size, H, 3),
        momentum=zeros(chunk_size, H) if momentum else None,
        filled=jnp.zeros((batch,), jnp.int32),
    )


def ttt_scan(
    initial: FastWeights,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H D"],
    eta: Float[Array, "B T H 3"],
    momentum: Float[Array, "B T H"] | None = None,
    *,
    chunk_size: int,
    rule: Rule = MUON,
    order: str = "apply_update",
    writes: Bool[Array, "B T"] | None = None,
    state: FastState | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H D"], FastState | None]:
    """Write chunks of keys and values into fast weights; read them with queries.

    Chunks are counted from the start of each document. In the order "apply_update" a
    chunk writes once it is full; the open chunk at the end has not written yet.

    Args:
        initial: the weights before the first token, ``[H, D, F]`` and ``[H, F, D]``.
        q, k, v: queries, keys and values, used as given.
        eta: rates of gate, up and down.
        momentum: in [0, 1], averaged over the tokens of a chunk; None for no momentum.
        chunk_size: C.
        rule: how a chunk changes the weights.
        order: a row of the table above.
        writes: tokens that write, for the order "strided"; a chunk without any leaves
            the weights as they are.
        state: the state to continue from, in the order "apply_update".
        segment_ids: documents, in the order "apply_update"; see `layers.segments`.

    Returns:
        Float32 outputs, and the state after the last token (None where none was given).

    Raises:
        ValueError: an unknown order, or arguments that it does not take.
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is not one of {ORDERS}.")
    if (writes is not None) != (order == "strided"):
        raise ValueError(
            f"order={order!r} with writes {'None' if writes is None else 'given'}: the "
            "order 'strided' needs the tokens that write, and no other takes them."
        )
    if order != "apply_update" and not (state is None and segment_ids is None):
        raise ValueError(
            f"order={order!r} works on whole rows; only 'apply_update', which is "
            "causal, takes a state or segment_ids. Give each document a row of its own."
        )
    initial = jax.tree.map(lambda w: w.astype(jnp.float32), initial)
    eta = eta.astype(jnp.float32)
    if momentum is not None:
        momentum = momentum.astype(jnp.float32)
    tokens = q, k, v, eta, momentum
    if order != "apply_update":
        return _by_chunk(initial, tokens, chunk_size, rule, order, writes), None
    if state is None and segment_ids is None:
        return _one_document(initial, tokens, chunk_size, rule), None
    return _documents(initial, tokens, chunk_size, rule, state, segment_ids)


def ttt_step(
    initial: FastWeights,
    q: Float[Array, "B H D"],
    k: Float[Array, "B H D"],
    v: Float[Array, "B H D"],
    eta: Float[Array, "B H 3"],
    momentum: Float[Array, "B H"] | None = None,
    *,
    state: FastState,
    rule: Rule = MUON,
) -> tuple[Float[Array, "B H D"], FastState]:
    """Run `ttt_scan` for one token: read the weights; write once its chunk is full."""
    initial = jax.tree.map(lambda w: w.astype(jnp.float32), initial)
    W = _add(initial, state.change)
    o = apply(used(W, initial, rule), q[:, :, None])[:, :, 0]

    row = jnp.arange(q.shape[0])

    def put(slots, x):
        return slots.at[row, state.filled].set(x.astype(slots.dtype))

    opened = dataclasses.replace(
        state,
        k=put(state.k, k),
        v=put(state.v, v),
        eta=put(state.eta, eta),
        momentum=None if momentum is None else put(state.momentum, momentum),
        filled=state.filled + 1,
    )
    full = opened.filled == state.k.shape[1]

    def close(s: FastState) -> FastState:
        W_new, velocity = update(
            W,
            s.velocity,
            _heads_first(s.k.astype(q.dtype)),
            _heads_first(s.v.astype(q.dtype)),
            _heads_first(s.eta),
            None if s.momentum is None else jnp.mean(s.momentum, axis=1),
            initial,
            rule,
        )
        closed = FastState(
            change=_subtract(W_new, initial),
            velocity=velocity,
            **jax.tree.map(jnp.zeros_like, _open_chunk(s)),
            filled=jnp.zeros_like(s.filled),
        )
        return _select(full, closed, s)

    # Rows fill their chunks at different steps; steps at which none does cost nothing.
    return o, jax.lax.cond(jnp.any(full), close, lambda s: s, opened)


class _Chunk(NamedTuple):
    """The inputs of the scan's steps, with a leading axis M of steps."""

    k: Float[Array, "B H C D"]
    v: Float[Array, "B H C D"]
    eta: Float[Array, "B H C 3"]
    momentum: Float[Array, "B H"] | None
    valid: Bool[Array, " B"] | None = None  # whether it writes; None: all do
    first: Bool[Array, " B"] | None = None  # whether it starts from the initial weights


def _scan(W, velocity, chunks: _Chunk, queries, initial: FastWeights, rule: Rule):
    """Scan over chunks: each updates the weights, then its queries read them.

    Queries are ``[B, H, C, D]`` a chunk. The backward pass computes each chunk again
    and keeps only the weights between chunks.
    """

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(carry, xs):
        chunk, q = xs
        if chunk.first is not None:
            start = jax.tree.map(lambda w: w[None], initial)
            rest = None if velocity is None else jax.tree.map(jnp.zeros_like, start)
            carry = _select(chunk.first, (start, rest), carry)
        k, v, eta, momentum = chunk[:4]
        new = update(carry[0], carry[1], k, v, eta, momentum, initial, rule)
        if chunk.valid is not None:
            new = _select(chunk.valid, new, carry)
        new = jax.tree.map(lambda w: constrain(w, "batch", "heads", None, None), new)
        return new, None if q is None else apply(used(new[0], initial, rule), q)

    (W, velocity), o = jax.lax.scan(body, (W, velocity), (chunks, queries))
    return W, velocity, o


def _one_document(initial, tokens, C: int, rule: Rule):
    """Run rows that hold one document from its start: chunks are a reshape."""
    q, k, v, eta, momentum = tokens
    B, T = q.shape[:2]
    writing = (T - 1) // C  # what the last chunk would write is never read
    queries = _chunked(q, C)

    def full(x):
        return _chunked(x[:, : writing * C], C)

    mean = None if momentum is None else jnp.mean(full(momentum), axis=-1)
    chunks = _Chunk(full(k), full(v), full(eta), mean)
    o = apply(used(initial, initial, rule), queries[:1])
    if writing:
        W, velocity = _start(initial, B, momentum)
        *_, rest = _scan(W, velocity, chunks, queries[1:], initial, rule)
        o = jnp.concatenate([o, rest])
    return _to_tokens(o)[:, :T]


def _by_chunk(initial, tokens, C: int, rule: Rule, order: str, writes):
    """Run the orders in which a chunk writes before it is read."""
    q, k, v, eta, momentum = tokens
    B, T = q.shape[:2]
    chosen = jnp.ones((B, T, 1), bool) if writes is None else writes[..., None]
    chosen = _chunked(chosen, C)  # padding writes nothing
    weight = chosen.astype(jnp.float32)
    if momentum is not None:
        total = jnp.sum(_chunked(momentum, C) * weight, axis=-1)
        momentum = total / jnp.maximum(jnp.sum(weight, axis=-1), 1)
    chunks = _Chunk(
        k=_chunked(k, C),
        v=_chunked(v, C),
        eta=_chunked(eta, C) * weight[..., None],
        momentum=momentum,
        valid=jnp.any(chosen, axis=(2, 3)),
    )
    queries = _chunked(q, C)
    W, velocity = _start(initial, B, momentum)
    if order == "update_all":
        W, *_ = _scan(W, velocity, chunks, None, initial, rule)
        o = apply(jax.tree.map(lambda w: w[None], used(W, initial, rule)), queries)
    else:
        *_, o = _scan(W, velocity, chunks, queries, initial, rule)
    return _to_tokens(o)[:, :T]


def _documents(initial, tokens, C: int, rule: Rule, state, segment_ids):
    """Run packed rows, padding and states: chunks start where their documents do.

    Only full chunks write, and there are at most T / C of them however many documents
    there are. After each, the weights read the C tokens that follow. The tokens before
    the first full chunk of their document read the weights it began with.
    """
    q, k, v, eta, momentum = jax.tree.map(
        lambda x: segments.without_padding(x, segment_ids), tokens
    )
    B, T = q.shape[:2]
    ids = jnp.zeros((B, T), jnp.int32) if segment_ids is None else segment_ids
    ids = segments.documents(ids)
    first, end = segments.first_real(ids), segments.end_real(ids)
    in_first = ids == segments.at(ids, first)[:, None]
    filled = jnp.zeros((B,), jnp.int32) if state is None else state.filled
    place = segments.positions(ids, filled)  # counted from the start of a chunk

    # The m-th full chunk of a row ends at token ends[m].
    closes = segments.real(ids) & (place % C == C - 1)
    closed = jnp.cumsum(closes.astype(jnp.int32), axis=1)
    M = (T - 1) // C if state is None else (T + C - 1) // C
    ends = jax.vmap(lambda n: jnp.searchsorted(n, jnp.arange(1, M + 1)))(closed)
    at_end = functools.partial(jnp.take_along_axis, indices=ends, axis=1, mode="clip")

    past = 0 if state is None else C  # rows before the first token

    def around(x, slots):
        """Pad C rows at the end; put the open chunk before the first real token."""
        x = jnp.pad(x, ((0, 0), (past, C), *[(0, 0)] * (x.ndim - 2)))
        if slots is None:
            return x
        slots = jnp.pad(slots, ((0, 0), (C, 0), *[(0, 0)] * (x.ndim - 2)))
        return rows.write(x, rows.read(slots, filled, C).astype(x.dtype), first)

    def windows(x, starts):
        """Read C rows from each start, ``[M, B, H, C, ...]``."""
        read = jax.vmap(rows.read, in_axes=(None, 1, None))(x, starts, C)
        return jnp.moveaxis(read, 2, 3)

    written = {"k": k, "v": v, "eta": eta, "momentum": momentum}
    written = {
        name: None if x is None else around(x, getattr(state, name, None))
        for name, x in written.items()
    }
    chunk = jax.tree.map(lambda x: windows(x, ends + 1 - C + past), written)
    if momentum is not None:
        chunk["momentum"] = jnp.mean(chunk["momentum"], axis=-1)
    valid = jnp.arange(M)[None] < closed[:, -1:]
    starts = valid & (at_end(place) < C) & ~at_end(in_first)
    chunks = _Chunk(**chunk, valid=valid.T, first=starts.T)
    queries = jnp.pad(q, ((0, 0), (0, C), (0, 0), (0, 0)))
    W, velocity = _start(initial, B, momentum, state)
    o_open = apply(used(W, initial, rule), windows(queries, first[:, None])[0])
    W, velocity, o = _scan(
        W, velocity, chunks, windows(queries, ends + 1), initial, rule
    )

    # Find each token's output in [open chunk, after chunk 0, after chunk 1, ...].
    index = jnp.arange(T)[None]
    row = jnp.where(
        place < C,
        index - first[:, None],
        (closed - closes.astype(jnp.int32)) * C + place % C,
    )
    o = _to_tokens(jnp.concatenate([o_open[None], o]))
    o = jnp.take_along_axis(o, row[..., None, None], axis=1, mode="clip")
    if segment_ids is not None:
        o_initial = apply(used(initial, initial, rule), jnp.swapaxes(q, 1, 2))
        fresh = (place < C) & ~in_first
        o = jnp.where(fresh[..., None, None], jnp.swapaxes(o_initial, 1, 2), o)
    if state is None:
        return o, None

    def last(x):
        return jnp.take_along_axis(x, end[:, None] - 1, axis=1)[:, 0]

    any_real = first < T
    filled = jnp.where(any_real, (last(place) + 1) % C, filled)
    # Otherwise the last document is a new one that has written nothing yet.
    carries = last(in_first) | (last(place) + 1 >= C)
    still_open = jnp.arange(C)[None] < filled[:, None]

    def open_chunk(x):
        x = rows.read(x, end + past - filled, C)
        return jnp.where(still_open.reshape(B, C, *[1] * (x.ndim - 2)), x, 0)

    slots = jax.tree.map(open_chunk, written)
    slots = jax.tree.map(lambda x, old: x.astype(old.dtype), slots, _open_chunk(state))
    changed = _subtract(W, initial), velocity
    change, velocity = _select(carries, changed, jax.tree.map(jnp.zeros_like, changed))
    return o, FastState(change=change, velocity=velocity, **slots, filled=filled)


def _start(initial, batch: int, momentum, state: FastState | None = None):
    """Return the weights and velocities with which rows start."""
    if state is not None:
        return _add(initial, state.change), state.velocity
    W = jax.tree.map(lambda w: jnp.broadcast_to(w[None], (batch, *w.shape)), initial)
    return W, None if momentum is None else jax.tree.map(jnp.zeros_like, W)


def _open_chunk(state: FastState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in ("k", "v", "eta", "momentum")}


def _add(initial: FastWeights, change: FastWeights) -> FastWeights:
    return jax.tree.map(lambda w, d: w[None] + d, initial, change)


def _subtract(W: FastWeights, initial: FastWeights) -> FastWeights:
    return jax.tree.map(lambda w, w_initial: w - w_initial[None], W, initial)


def _select(condition_B, new, old):
    """Take `new` in the rows where the condition holds, `old` in the others."""

    def pick(a, b):
        return jnp.where(condition_B.reshape(-1, *[1] * (b.ndim - 1)), a, b)

    return jax.tree.map(pick, new, old)


def _heads_first(x):
    """Turn [B, C, H, ...] into [B, H, C, ...]."""
    return jnp.swapaxes(x, 1, 2)


def _chunked(x, C: int):
    """Cut [B, T, H, ...] into [M, B, H, C, ...], with zeros at the end."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % C), *[(0, 0)] * (x.ndim - 2)))
    x = x.reshape(x.shape[0], -1, C, *x.shape[2:])
    return jnp.moveaxis(x, (1, 3), (0, 2))


def _to_tokens(o):
    """Join [M, B, H, C, D] to [B, M C, H, D]."""
    o = jnp.moveaxis(o, (0, 2), (1, 3))
    return o.reshape(o.shape[0], -1, *o.shape[3:])
