"""Decode states: checks with a sentence for the user."""

from typing import Any

import jax


def check_shapes(state: Any, expected: Any, made_by: str) -> None:
    """Compare a state's arrays with those that its config needs.

    Args:
        state: what the caller gave.
        expected: what it should look like, arrays or abstract arrays.
        made_by: the call that makes a right one, for the message.

    Raises:
        ValueError: an array is missing, superfluous or of another shape; names it.
    """

    def shapes(tree):
        return {
            jax.tree_util.keystr(path).lstrip("."): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    has, needs = shapes(state), shapes(expected)
    for name in needs | has:
        if has.get(name) != needs.get(name):
            raise ValueError(
                f"The state has {name} of shape {has.get(name)}, but the Config and "
                f"the batch need {needs.get(name)}. It belongs to another Config or "
                f"batch; make one with {made_by}."
            )
