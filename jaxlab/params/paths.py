"""Names for the leaves of a parameter tree, and selection by path or by role."""

import re
from collections.abc import Sequence
from typing import Any

import jax

from jaxlab.params.spec import ROLES, ParamSpec


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


def select[T](specs: Any, rules: Sequence[tuple[str, T]]) -> Any:
    """Give every parameter the value of the first rule that names it.

    Args:
        specs: tree of `ParamSpec`.
        rules: pairs ``(pattern, value)``. A pattern that is a role (``"matrix"``)
            matches every parameter of that role, any other is a regular expression
            that must match the whole path name (``"blocks/.*/w_[qk]"``, ``".*"``).

    Returns:
        A tree shaped like `specs` with one value a parameter.

    Raises:
        ValueError: a parameter that no rule covers, or a path pattern that matches
            no parameter (nearly always a typing mistake); the message names them.
    """

    def matches(pattern: str, name: str, spec: ParamSpec) -> bool:
        if pattern in ROLES:
            return spec.role == pattern
        return re.fullmatch(pattern, name) is not None

    named = named_leaves(specs)
    for pattern, _ in rules:
        if pattern not in ROLES and not any(matches(pattern, n, s) for n, s in named):
            raise ValueError(
                f"The rule {pattern!r} matches no parameter. It is neither a role "
                f"{ROLES} nor a pattern for one of the paths, such as "
                f"{[name for name, _ in named[:4]]}."
            )
    uncovered = [
        f"{name} (role {spec.role!r})"
        for name, spec in named
        if not any(matches(pattern, name, spec) for pattern, _ in rules)
    ]
    if uncovered:
        raise ValueError(
            f"No rule covers {len(uncovered)} of {len(named)} parameters: "
            f"{', '.join(uncovered[:8])}{', ...' if len(uncovered) > 8 else ''}. "
            "Add a rule for them, or a last rule '.*' for the rest."
        )
    values = [
        next(value for pattern, value in rules if matches(pattern, name, spec))
        for name, spec in named
    ]
    return jax.tree.unflatten(jax.tree.structure(specs), values)
