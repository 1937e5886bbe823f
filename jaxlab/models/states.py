"""States of a model as values: rows taken, put in and repeated.

Every array of `init_state` is ``[L, B, ...]``: layers are stacked in front, and a row
of the batch is one index of axis 1. Only this file needs to know.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def take_rows(state: Any, rows: Int[Array, " R"]) -> Any:
    """The state of some rows of a batch.

    Args:
        state: of a batch of B rows.
        rows: int ``[R]`` from 0 to B - 1; a row may come twice.

    Returns:
        The state of a batch of R rows.
    """
    return jax.tree.map(lambda a: jnp.take(a, rows, axis=1), state)


def insert_rows(state: Any, rows: Int[Array, " R"], other: Any) -> Any:
    """`state` with some of its rows replaced: those of `take_rows`, put back.

    Args:
        state: of a batch of B rows.
        rows: int ``[R]`` from 0 to B - 1, no two the same.
        other: the state of a batch of R rows, whose row i becomes row ``rows[i]``.

    Returns:
        The state of a batch of B rows, with the dtypes of `state`.
    """
    return jax.tree.map(lambda a, b: a.at[:, rows].set(b), state, other)


def repeat_rows(state: Any, count: int) -> Any:
    """The state of a batch in which every row stands `count` times in a row.

    Args:
        state: of a batch of B rows.
        count: copies; those of row b are the rows from ``b * count`` on.

    Returns:
        The state of a batch of ``B * count`` rows.
    """
    return jax.tree.map(lambda a: jnp.repeat(a, count, axis=1), state)
