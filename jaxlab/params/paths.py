"""Names for the leaves of a parameter tree."""

from collections.abc import Sequence
from typing import Any

import jax


def path_name(path: Sequence[Any]) -> str:
    """The key path of a leaf as ``blocks/0/mixer/w_q``."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """All leaves of `tree` with their path names, in tree order.

    A structured weight (`LowRank`, `Quantized`, `Tapped`) contributes its arrays, one
    name each; a `ParamSpec` is itself a leaf.
    """
    return [
        (path_name(path), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]
