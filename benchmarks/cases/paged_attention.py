"""Named ragged batches of paged attention, and caches to serve them from.

What breaks a ragged kernel is in `RAGGED`: lengths beside a page's end, sequences
without queries or keys, and all kinds of requests in one call.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

QUANTISED = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
"""The largest value of each dtype of quantised pages."""


class Heads(NamedTuple):
    """Query heads, heads of keys and values, head size, tokens a page."""

    Hq: int
    Hkv: int
    D: int
    page: int


class Room(NamedTuple):
    """The room of a call: sequences, rows of queries, pages, pages per sequence."""

    S: int
    Tq: int
    P: int
    pages_per_seq: int


SMALL = Heads(Hq=4, Hkv=2, D=16, page=4)
ROOM = Room(S=7, Tq=40, P=28, pages_per_seq=12)

# Of each sequence (queries, keys), in pages of 4.
RAGGED = {
    "decode": ((1, 1), (1, 3), (1, 4), (1, 5), (1, 31), (1, 17)),
    "prefill": ((9, 9), (4, 4), (1, 1), (23, 23)),
    "chunks": ((7, 29), (16, 16), (3, 40)),
    "verify": ((4, 8), (4, 9), (4, 4), (4, 33)),
    "mixed": ((1, 12), (19, 30), (4, 21), (1, 1), (5, 5)),
    "empty": ((0, 0), (0, 7), (3, 3), (2, 0), (0, 4), (1, 8)),
    "no_keys": ((1, 0), (2, 0)),
    "no_queries": ((0, 5), (0, 0)),
    "more_queries_than_keys": ((5, 3), (1, 2)),
    "full": ((1, 48), (39, 48)),
}


def random_ragged(seed: int) -> list[tuple[int, int]]:
    """Sequences that fit `ROOM`, of any kinds."""
    rng = np.random.default_rng(seed)
    sequences, queries, pages = [], 0, 0
    for _ in range(rng.integers(1, ROOM.S + 1)):
        keys = int(rng.integers(0, SMALL.page * ROOM.pages_per_seq + 1))
        kinds = (0, 1, 1, min(keys, 4), int(rng.integers(0, keys + 1)))
        new = int(rng.choice(kinds))
        used = -(-keys // SMALL.page)
        if queries + new <= ROOM.Tq and pages + used <= ROOM.P:
            sequences.append((new, keys))
            queries, pages = queries + new, pages + used
    return sequences


def draw(
    sequences: Sequence[tuple[int, int]],
    heads: Heads = SMALL,
    room: Room = ROOM,
    *,
    dtype: str = "float32",
    pages: str | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray | None]:
    """The arguments of `paged_attention`: a cache in random order, poisoned.

    Everything that must not be read is NaN (the largest number in int8): pages that no
    sequence has, the slots past a sequence's last key, queries past the last sequence;
    entries of the page table past a sequence's length are out of range.

    Args:
        sequences: of each one its queries and its keys; those that `room` has besides
          have neither.
        dtype: of queries, and of pages unless `pages` says another.
        pages: the dtype of quantised pages; their scales are a number a token and head.
    """
    rng = np.random.default_rng(seed)
    Hq, Hkv, D, page = heads
    sequences = [*sequences, *[(0, 0)] * (room.S - len(sequences))]
    table = rng.choice([-1, -(2**31), 2**31 - 1], (room.S, room.pages_per_seq))
    live = np.zeros((room.P, page), bool)
    unused = iter(rng.permutation(room.P))
    for s, (_, keys) in enumerate(sequences):
        for i in range(-(-keys // page)):
            table[s, i] = next(unused)
            live[table[s, i], : keys - i * page] = True

    cu_q_lens = np.cumsum([0, *(queries for queries, _ in sequences)])
    q = rng.standard_normal((room.Tq, Hq, D))
    q[cu_q_lens[-1] :] = np.nan
    arguments: dict[str, np.ndarray | None] = {
        "q": q.astype(jnp.dtype(dtype)),
        "page_table": table.astype(np.int32),
        "kv_lens": np.array([keys for _, keys in sequences], np.int32),
        "cu_q_lens": cu_q_lens.astype(np.int32),
    }
    for name in ("k", "v"):
        x = rng.standard_normal((*live.shape, Hkv, D))
        scale = None
        if pages in QUANTISED:
            scale = np.abs(x).max(-1) / QUANTISED[pages]
            x = x / scale[..., None]
            x = np.round(x) if pages == "int8" else x
            scale = np.where(live[..., None], scale, np.nan).astype(np.float32)
        if pages == "int8":
            x = np.where(live[..., None, None], x, 127)
        else:
            x = np.where(live[..., None, None], x, np.nan)
        arguments[f"{name}_pages"] = x.astype(jnp.dtype(pages or dtype))
        arguments[f"{name}_scale"] = scale
    return arguments
