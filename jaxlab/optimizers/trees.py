"""Optimizers on any pytree: specs for the tree at hand, and trees that must agree."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlab.params import ParamSpec, infer, named_leaves, path_name


def with_specs(
    specs: Any, make: Callable[[Any], optax.GradientTransformation]
) -> optax.GradientTransformationExtraArgs:
    """The transformation ``make(specs)`` with the specs of each tree that it is given.

    `init` takes the specs of the parameters, `update` those of the updates. They are
    derived (`jaxlab.params.infer`) where `specs` is None, and otherwise those of the
    leaves with the same paths. A leaf that a wrapper such as `optax.masked` took out of
    the tree (`optax.MaskedNode`) has no spec.

    Args:
        specs: tree of `ParamSpec`, or of arrays with the shapes of the parameters, or
            None.
        make: from specs, laid out like the parameters, to a transformation.

    Raises:
        ValueError: parameters or updates that differ from the specs or from each other
            in a leaf or in its shape.
    """
    if specs is not None:
        specs = infer(specs)
        make(specs)  # raises here what it would raise in `init`

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
    """Refuse updates whose leaves are not those of another tree.

    Args:
        updates: tree of arrays.
        other: tree with the same paths and shapes, masked leaves apart.
        what: `other` in words.
        shapes: whether shapes are compared.

    Raises:
        ValueError: one sentence that names the first leaf that differs.
    """
    if not shapes and jax.tree.structure(updates) == jax.tree.structure(other):
        return
    _check_leaves(_named(updates), _named(other), "updates", what, shapes)


def beside(specs: Any, values: dict[str, Any]) -> Any:
    """Values that a state keeps by path; one leaf where `init` gets a placeholder.

    `optax.tree_utils.tree_map_params` gives it, to learn where a state is shaped like
    the parameters, and takes a leaf for all that stands in its place.
    """
    return jnp.zeros(()) if isinstance(specs, PLACEHOLDER) else values


def _specs_of(specs: Any, tree: Any, what: str) -> Any:
    """Specs with the structure of `tree`."""
    if specs is None:
        return infer(tree)
    if tree is None or isinstance(tree, PLACEHOLDER):
        return specs  # only what the specs say of the state is asked for
    declared = _named(specs)
    _check_leaves(_named(tree), declared, what, "specs", shapes=True)
    own = [declared[name] for name, _ in named_leaves(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), own)


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
            f"Two leaves have the path {twice!r}; rename one, such as a key with a "
            "slash in it."
        )
    return named


def _check_leaves(
    own: dict[str, Any], other: dict[str, Any], what: str, others: str, shapes: bool
) -> None:
    masked = tuple(name for name, leaf in own.items() if _is_masked(leaf))
    unknown = [n for n in own if n not in masked and _is_masked(other.get(n, MASKED))]
    absent = [n for n in other if n not in own and not _below(n, masked)]
    absent = [n for n in absent if not _is_masked(other[n])]
    for names, present, without in ((unknown, what, others), (absent, others, what)):
        if names:
            raise ValueError(
                f"The {without} have no leaf {names[0]!r}, which the {present} have; "
                "give the optimizer trees of one structure."
            )
    if not shapes:
        return
    for name, leaf in own.items():
        if name not in masked and jnp.shape(leaf) != _shape(other[name]):
            raise ValueError(
                f"The leaf {name!r} has shape {jnp.shape(leaf)} in the {what} and "
                f"{_shape(other[name])} in the {others}; give the optimizer trees of "
                "one structure."
            )


def _shape(leaf: Any) -> tuple[int, ...]:
    return leaf.shape if isinstance(leaf, ParamSpec) else jnp.shape(leaf)


def _below(name: str, masked: tuple[str, ...]) -> bool:
    """Whether a path lies in a subtree that is masked as a whole."""
    return any(name.startswith(f"{node}/") or node == "" for node in masked)


def _placeholder() -> type:
    seen = []

    def init(params):
        seen.append(type(params))
        return ()

    optax.tree_utils.tree_map_params(init, lambda leaf: leaf, ())
    return seen[0]


PLACEHOLDER = _placeholder()
"""The node that `optax.tree_utils.tree_map_params` gives to `init`."""
