"""Decode states: checks with a sentence for the user."""

from collections.abc import Callable
from typing import Any

import jax


def check_state(
    state: Any,
    init_state: Callable,
    cfg: Any,
    batch: int,
    max_length: int | None = None,
) -> None:
    """Compare a state's arrays with those that its config and batch need.

    Args:
        state: what the caller gave; None for none.
        init_state: the mixer's.
        cfg: the mixer's Config.
        batch: rows.
        max_length: that the state was made for, where it matters.

    Raises:
        ValueError: an array is missing, superfluous or of another shape; names it.
    """
    if state is None:
        return

    def shapes(tree):
        return {
            jax.tree_util.keystr(path).lstrip("."): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    has = shapes(state)
    needs = shapes(jax.eval_shape(lambda: init_state(cfg, batch, max_length)))
    mixer = init_state.__module__.rpartition(".")[2]
    for name in needs | has:
        if has.get(name) != needs.get(name):
            raise ValueError(
                f"The state has {name} of shape {has.get(name)}, but the Config and "
                f"the batch need {needs.get(name)}. It belongs to another Config or "
                f"batch; make one with {mixer}.init_state(cfg, {batch}, max_length)."
            )
