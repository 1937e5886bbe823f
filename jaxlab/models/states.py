"""Taking, replacing and repeating rows of a model's state.

Every array of `init_state` is ``[L, B, ...]``: the layers are stacked along axis 0, and
axis 1 is the batch. Only this file relies on that.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def take_rows(state: Any, rows: Int[Array, " R"]) -> Any:
    """The state of some rows of a batch.

    Args:
        state: state of a batch of B rows.
        rows: int ``[R]`` from 0 to B - 1; a row may appear more than once.

    Returns:
        The state of a batch of R rows.
    """
    return jax.tree.map(lambda a: jnp.take(a, rows, axis=1), state)


def insert_rows(state: Any, rows: Int[Array, " R"], other: Any) -> Any:
    """`state` with some of its rows replaced, such as those from `take_rows`.

    Args:
        state: state of a batch of B rows.
        rows: int ``[R]`` from 0 to B - 1, all different.
        other: state of a batch of R rows; its row i becomes row ``rows[i]``.

    Returns:
        The state of a batch of B rows, with the dtypes of `state`.
    """
    return jax.tree.map(lambda a, b: a.at[:, rows].set(b), state, other)


def repeat_rows(state: Any, count: int) -> Any:
    """The state of a batch with `count` consecutive copies of every row.

    Args:
        state: state of a batch of B rows.
        count: copies per row; those of row b are the rows from ``b * count`` on.

    Returns:
        The state of a batch of ``B * count`` rows.
    """
    return jax.tree.map(lambda a: jnp.repeat(a, count, axis=1), state)
