"""Specs of parameters that somebody else declared, derived from their arrays."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from jaxlab.params.paths import path_name
from jaxlab.params.spec import ROLES, ParamSpec, select

OWN_AXES = {"matrix": 2, "embedding": 2, "head": 2, "scale": 1, "bias": 1, "decay": 1}
"""How many of an array's last axes a role describes, those before being a stack; all
for a "convolution", whose filters have one or two axes of positions."""


def infer(tree: Any, rules: Sequence[tuple[str, str]] = ()) -> Any:
    """Derive a tree of `ParamSpec` from the arrays of any pytree.

    The number of axes decides the role: an array ``[*stack, in, out]`` is a "matrix",
    an array with one axis a "scale", which stands for every vector, and so is a number
    without axes. Nothing is guessed from names: a table of embeddings, a head, the
    filters of a convolution and the biases of stacked layers ``[layers, out]`` count as
    matrices until a rule says what they are. The axes of a stack are named "layers", as
    `stack` names them, and the others have no name.

    Args:
        tree: any pytree of arrays or of `jax.ShapeDtypeStruct`: nested dicts, lists and
            tuples, a `flax.nnx.State`, the parameters of a linen module, a registered
            dataclass. A `ParamSpec` in it stays as it is. A leaf masked by optax
            (`optax.MaskedNode`) has no spec.
        rules: pairs ``(pattern, role)``, the first that matches decides. Patterns are
            those of `select`: a role, for every parameter that would have it, or a
            regular expression for the whole path, such as ``"blocks/.*/bias"``.

    Returns:
        A tree with the structure of `tree` and one `ParamSpec` a leaf.

    Raises:
        ValueError: a leaf that is no array or is empty, a rule that matches no leaf, or
            a role that is unknown or takes more axes than the array has.
    """
    specs = jax.tree_util.tree_map_with_path(_spec, tree)
    if not rules:
        return specs
    for pattern, role in rules:
        _check_rule(specs, pattern, role)
    roles = select(specs, [*rules, *((role, role) for role in ROLES)])
    return jax.tree_util.tree_map_with_path(_with_role, tree, specs, roles)


def _spec(path: Sequence[Any], leaf: Any) -> ParamSpec:
    if isinstance(leaf, ParamSpec):
        return leaf
    try:
        array = jax.typeof(leaf)
    except TypeError as error:
        raise ValueError(
            f"The leaf {path_name(path)!r} is a {type(leaf).__name__}, not an array; "
            "keep only arrays in the tree of parameters, such as by None elsewhere."
        ) from error
    shape = array.shape
    if 0 in shape:
        raise ValueError(
            f"The leaf {path_name(path)!r} with shape {shape} has no entries; leave it "
            "out of the tree of parameters."
        )
    role = "matrix" if len(shape) >= 2 else "scale"
    return ParamSpec(shape, _axes(shape, role), role=role, dtype=array.dtype)


def _axes(shape: tuple[int, ...], role: str) -> tuple[str | None, ...]:
    own = min(OWN_AXES.get(role, len(shape)), len(shape))
    return ("layers",) * (len(shape) - own) + (None,) * own


def _check_rule(specs: Any, pattern: str, role: str) -> None:
    if role not in ROLES:
        raise ValueError(
            f"The rule {(pattern, role)!r} gives the role {role!r}, which is not one "
            f"of {ROLES}."
        )
    if pattern not in ROLES:
        return  # `select` refuses a path pattern that matches nothing
    inferred = {spec.role for spec in jax.tree.leaves(specs)}
    if pattern not in inferred:
        raise ValueError(
            f"The rule {(pattern, role)!r} matches no parameter: {pattern!r} is a "
            f"role, and the arrays have {sorted(inferred)}; for a path of that name "
            f"write '({pattern})'."
        )


def _with_role(path: Sequence[Any], leaf: Any, spec: ParamSpec, role: str) -> ParamSpec:
    if role == spec.role:
        return spec
    if OWN_AXES.get(role) == 2 and len(spec.shape) < 2:
        raise ValueError(
            f"The leaf {path_name(path)!r} with shape {spec.shape} cannot have the "
            f"role {role!r}, which takes two axes, [*stack, in, out]; give it 'scale', "
            "'bias' or 'decay'."
        )
    declared = isinstance(leaf, ParamSpec)
    axes = spec.axes if declared else _axes(spec.shape, role)
    return dataclasses.replace(spec, axes=axes, role=role)
