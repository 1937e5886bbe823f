"""Optimizers for any pytree: specs matched to a tree, and checks that trees agree."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.params import ParamSpec, Tapped, infer, named_leaves, path_name


def with_specs(
    specs: Any,
    make: Callable[[Any], optax.GradientTransformation],
    needs_params: str | None = None,
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
        needs_params: what `update` needs the parameters for, as a sentence; None if it
            does without them.

    Raises:
        ValueError: parameters or updates differ from the specs; or as by `checked`.
        TypeError: as by `checked`.
    """
    if specs is not None:
        specs = infer(specs)
        make(specs)  # raises errors here rather than in `init`

    def init(params):
        return make(_specs_of(specs, params, "parameters")).init(params)

    def inner_for(updates):
        return make(_specs_of(specs, updates, "updates"))

    return _checked(init, inner_for, needs_params)


def checked(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Return `inner`, with a sentence for trees that do not fit each other.

    Only names, shapes and dtypes are compared, so a compiled step costs nothing more.

    Raises:
        TypeError: a leaf of the parameters or the updates is no array of floating-point
            numbers.
        ValueError: the updates differ from the parameters, or the state from one that
            `init` makes, in a leaf, its shape, or the containers; names the leaf.
    """
    return _checked(inner.init, lambda updates: inner)


def _checked(init, inner_for, needs_params=None):
    """The transformation of `init` and of ``inner_for(updates).update``, checked."""

    def checked_init(params):
        if params is None and needs_params is not None:
            raise ValueError(f"{needs_params}, but params is None; call init(params).")
        check_numbers(params, "parameters")
        return init(params)

    def update(updates, state, params=None, **extra):
        if params is None and needs_params is not None:
            raise ValueError(
                f"{needs_params}, but params is None; call update(gradient, state, "
                "params)."
            )
        check_numbers(updates, "updates")
        if params is not None:
            check_numbers(params, "parameters")
            _check_same(updates, params, "updates", "parameters given to update")
        inner = inner_for(updates)
        made = jax.eval_shape(inner.init, updates)
        _check_same(state, made, "state", "state that init makes for the updates")
        return optax.with_extra_args_support(inner).update(
            updates, state, params, **extra
        )

    return optax.GradientTransformationExtraArgs(checked_init, update)


def check_numbers(tree: Any, what: str) -> None:
    """Refuse a tree with a leaf that is no array of floating-point numbers.

    Args:
        tree: arrays, or their shapes.
        what: the tree in words.

    Raises:
        TypeError: names the first such leaf.
    """
    for name, leaf in _pairs(tree):
        if _is_masked(leaf):
            continue
        if isinstance(leaf, Tapped):
            raise TypeError(
                f"The leaf {name!r} of the {what} has a tap; split it off by "
                "jaxlab.params.untap, and give the taps as stats=taps."
            )
        kind = kind_of(leaf)
        if kind is None or not jnp.issubdtype(kind.dtype, jnp.floating):
            raise TypeError(
                f"The leaf {name!r} of the {what} is "
                f"{kind or f'of type {type(leaf).__name__}'}, but it must be an array "
                "of floating-point numbers; cast it, or leave it out by optax.masked."
            )


def kind_of(leaf: Any) -> Any:
    """The shape and dtype of an array; None for anything else."""
    try:
        return jax.typeof(leaf)
    except TypeError:
        return None


def check_flags(flags: Any, specs: Any, what: str) -> None:
    """Refuse all but a tree with one boolean for each parameter.

    Args:
        flags: the tree.
        specs: tree of `ParamSpec`.
        what: the name of the argument.

    Raises:
        TypeError: a leaf is no boolean.
        ValueError: a leaf is missing or superfluous, or in another container.
    """
    _check_same(flags, specs, f"tree {what}", "parameters", shapes=False)
    for name, flag in _named(flags).items():
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(
                f"The leaf {name!r} of {what} is {flag!r}, but it must be True or "
                "False."
            )


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
    _check_leaves(_named(tree), declared, what, "specs")
    matched = [declared[name] for name, _ in named_leaves(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), matched)


def _check_same(
    tree: Any, other: Any, what: str, of_other: str, shapes: bool = True
) -> None:
    """Refuse trees that differ in a leaf, its shape, or their containers."""
    leaves, others = _named(tree), _named(other)
    _check_leaves(leaves, others, what, of_other, shapes)
    masked = any(map(_is_masked, (*leaves.values(), *others.values())))
    if not masked and jax.tree.structure(tree) != jax.tree.structure(other):
        raise ValueError(
            f"The {what} and the {of_other} have the same leaves in other containers, "
            "such as a dict and a tuple; give the optimizer trees of the same "
            "structure."
        )


MASKED = optax.MaskedNode()


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _pairs(tree: Any) -> list[tuple[str, Any]]:
    """Leaves, masked nodes and weights with taps, with their paths."""

    def is_leaf(node):
        return isinstance(node, optax.MaskedNode | Tapped)

    pairs = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return [(path_name(path), leaf) for path, leaf in pairs]


def _named(tree: Any) -> dict[str, Any]:
    """Leaves and masked nodes by their paths."""
    pairs = _pairs(tree)
    named = dict(pairs)
    if len(named) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"Two leaves have the path {twice!r}; rename one of them, such as a key "
            "with a slash in it."
        )
    return named


def _check_leaves(
    leaves: dict[str, Any],
    others: dict[str, Any],
    what: str,
    other: str,
    shapes: bool = True,
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
                f"The leaf {names[0]!r} is in the {present}, but not in the {without}; "
                "give the optimizer trees of the same structure."
            )
    if not shapes:
        return
    for name, leaf in leaves.items():
        if name not in masked and jnp.shape(leaf) != _shape(others[name]):
            raise ValueError(
                f"The leaf {name!r} has shape {jnp.shape(leaf)} in the {what}, but "
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
