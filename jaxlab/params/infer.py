"""Specs of parameters declared outside jaxlab, derived from their arrays."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from jaxlab.params.paths import path_name
from jaxlab.params.spec import ROLES, ParamSpec, select

ROLE_AXES = {"matrix": 2, "embedding": 2, "head": 2, "scale": 1, "bias": 1, "decay": 1}
"""The number of an array's last axes that belong to a role; those before are a stack.
A "convolution" has all axes, since its filters have one or two axes of positions."""


def infer(tree: Any, rules: Sequence[tuple[str, str]] = ()) -> Any:
    """Derive a tree of `ParamSpec` from the arrays of any pytree.

    The number of axes decides the role: an array ``[*stack, in, out]`` is a "matrix",
    an array with one axis or none a "scale", whatever vector it is. Nothing is guessed
    from names: an embedding table, a head, the filters of a convolution and the biases
    of stacked layers ``[layers, out]`` count as matrices until a rule gives their role.
    The axes of a stack are named "layers", as by `stack`; the others have no name.

    Args:
        tree: any pytree of arrays or of `jax.ShapeDtypeStruct`: nested dicts, lists and
            tuples, a `flax.nnx.State`, the parameters of a linen module, a registered
            dataclass. A `ParamSpec` in it stays as it is. A leaf masked by optax
            (`optax.MaskedNode`) has no spec.
        rules: pairs ``(pattern, role)``; the first that matches decides. Patterns are
            those of `select`: a role, for every parameter that would have it, or a
            regular expression for the whole path, such as ``"blocks/.*/bias"``.

    Returns:
        A tree with the structure of `tree` and one `ParamSpec` per leaf.

    Raises:
        ValueError: a leaf is not an array or is empty, a rule matches no leaf, or a
            role is unknown or needs more axes than the array has.
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
            "keep only arrays in the tree of parameters, with None for anything else."
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
    role_axes = min(ROLE_AXES.get(role, len(shape)), len(shape))
    return ("layers",) * (len(shape) - role_axes) + (None,) * role_axes


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
            f"role, and the arrays have {sorted(inferred)}; to match a path of that "
            f"name, write '({pattern})'."
        )


def _with_role(path: Sequence[Any], leaf: Any, spec: ParamSpec, role: str) -> ParamSpec:
    if role == spec.role:
        return spec
    if ROLE_AXES.get(role) == 2 and len(spec.shape) < 2:
        raise ValueError(
            f"The leaf {path_name(path)!r} with shape {spec.shape} cannot have the "
            f"role {role!r}, which needs two axes, [*stack, in, out]; give it 'scale', "
            "'bias' or 'decay'."
        )
    declared = isinstance(leaf, ParamSpec)
    axes = spec.axes if declared else _axes(spec.shape, role)
    return dataclasses.replace(spec, axes=axes, role=role)
