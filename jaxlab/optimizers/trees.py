"""Optimizers for any pytree: specs matched to a tree, and checks that trees agree."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlab.params import ParamSpec, infer, named_leaves, path_name


def with_specs(
    specs: Any, make: Callable[[Any], optax.GradientTransformation]
) -> optax.GradientTransformationExtraArgs:
    """Return ``make(specs)`` as a transformation that fits specs to the trees it gets.

    `init` uses the specs of the parameters, `update` those of the updates. Specs are
    derived from the arrays (`jaxlab.params.infer`) if `specs` is None, and otherwise
    matched by path. A leaf that a wrapper such as `optax.masked` has taken out of the
    tree (`optax.MaskedNode`) has no spec.

    Args:
        specs: tree of `ParamSpec`, or of arrays with the shapes of the parameters, or
            None.
        make: function from specs, in the structure of the parameters, to a
            transformation.

    Raises:
        ValueError: parameters or updates differ from the specs or from each other in a
            leaf or its shape.
    """
    if specs is not None:
        specs = infer(specs)
        make(specs)  # raises errors here rather than in `init`

    def init(params):
        return make(_specs_of(specs, params, "parameters")).init(params)

    def update(updates, state, params=None, **extra):
        if params is not None:
            check_agree(updates, params, "parameters given to update")
        inner = make(_specs_of(specs, updates, "updates"))
        return optax.with_extra_args_support(inner).update(
            updates, state, params, **extra
        )

    return optax.GradientTransformationExtraArgs(init, update)


def check_agree(updates: Any, other: Any, what: str, shapes: bool = True) -> None:
    """Refuse updates whose leaves differ from those of another tree.

    Args:
        updates: tree of arrays.
        other: tree with the same paths and shapes, except for masked leaves.
        what: `other` in words.
        shapes: whether to compare shapes.

    Raises:
        ValueError: a leaf differs; names the first one.
    """
    if not shapes and jax.tree.structure(updates) == jax.tree.structure(other):
        return
    _check_leaves(_named(updates), _named(other), "updates", what, shapes)


def beside(specs: Any, values: dict[str, Any]) -> Any:
    """Return `values`, a state's arrays by path, or one leaf for a placeholder.

    `optax.tree_utils.tree_map_params` calls `init` with a placeholder to learn which
    parts of a state are shaped like the parameters. One leaf then stands for all arrays
    that the real state has in its place.
    """
    return jnp.zeros(()) if isinstance(specs, PLACEHOLDER) else values


def _specs_of(specs: Any, tree: Any, what: str) -> Any:
    """Specs with the structure of `tree`."""
    if specs is None:
        return infer(tree)
    if tree is None or isinstance(tree, PLACEHOLDER):
        return specs  # the caller wants the state's structure, which specs determine
    declared = _named(specs)
    _check_leaves(_named(tree), declared, what, "specs", shapes=True)
    matched = [declared[name] for name, _ in named_leaves(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), matched)


MASKED = optax.MaskedNode()


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _named(tree: Any) -> dict[str, Any]:
    """Leaves and masked nodes by their paths."""
    pairs = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_masked)[0]
    named = {path_name(path): leaf for path, leaf in pairs}
    if len(named) < len(pairs):
        names = [path_name(path) for path, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"Two leaves have the path {twice!r}; rename one of them, such as a key "
            "with a slash in it."
        )
    return named


def _check_leaves(
    leaves: dict[str, Any], others: dict[str, Any], what: str, other: str, shapes: bool
) -> None:
    masked = tuple(name for name, leaf in leaves.items() if _is_masked(leaf))
    extra = [
        name
        for name in leaves
        if name not in masked and _is_masked(others.get(name, MASKED))
    ]
    missing = [
        name
        for name, leaf in others.items()
        if name not in leaves and not _below(name, masked) and not _is_masked(leaf)
    ]
    for names, present, without in ((extra, what, other), (missing, other, what)):
        if names:
            raise ValueError(
                f"The {without} have no leaf {names[0]!r}, which the {present} have; "
                "give the optimizer trees of the same structure."
            )
    if not shapes:
        return
    for name, leaf in leaves.items():
        if name not in masked and jnp.shape(leaf) != _shape(others[name]):
            raise ValueError(
                f"The leaf {name!r} has shape {jnp.shape(leaf)} in the {what} and "
                f"{_shape(others[name])} in the {other}; give the optimizer trees of "
                "the same structure."
            )


def _shape(leaf: Any) -> tuple[int, ...]:
    return leaf.shape if isinstance(leaf, ParamSpec) else jnp.shape(leaf)


def _below(name: str, masked: tuple[str, ...]) -> bool:
    """Whether a path is within a subtree that is masked as a whole."""
    return any(name.startswith(f"{node}/") or node == "" for node in masked)


def _placeholder() -> type:
    seen = []

    def init(params):
        seen.append(type(params))
        return ()

    optax.tree_utils.tree_map_params(init, lambda leaf: leaf, ())
    return seen[0]


PLACEHOLDER = _placeholder()
"""The class of the node that `optax.tree_utils.tree_map_params` passes to `init`."""
