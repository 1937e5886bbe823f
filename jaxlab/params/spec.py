"""A parameter is declared once: shape, axes, initialisation and role.

Every module has one ``spec(cfg)`` that returns a nested dict of `ParamSpec`. Arrays,
abstract arrays, shardings, optimizer labels and parameter counts all derive from it.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array

from jaxlab.params.paths import named_leaves, path_name

Initializer = Callable[[Array, tuple[int, ...], Any], Array]

ROLES = ("matrix", "embedding", "head", "convolution", "scale", "bias", "decay")
"""The roles of parameters: `matrix` multiplies activations, `embedding` is looked up,
`head` makes logits, `convolution` holds short filters, `scale` and `bias` act on
channels, `decay` parametrises a forget gate. Optimizers label parameters by it."""

fan_in = initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
"""Variance 1 / (input size): keeps the size of activations in ``x @ w``."""


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Declaration of one parameter.

    Attributes:
        shape: the array's shape; matrices are ``[in, out]``.
        axes: one logical axis name (or None) per dimension; `params.sharding` maps
            them to mesh axes.
        init: initializer ``(key, shape, dtype) -> array``.
        role: one of `ROLES`; a "matrix" has at least two axes not named "layers".
        dtype: type in storage; the model chooses the type of activations.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer = fan_in
    role: str = "matrix"
    dtype: Any = jnp.float32

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(
                f"shape {self.shape} has {len(self.shape)} dimensions but axes "
                f"{self.axes} names {len(self.axes)}; give each dimension a name or "
                "None."
            )
        if any(size < 1 for size in self.shape):
            raise ValueError(f"shape {self.shape} has a dimension below 1.")
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r} is not one of {ROLES}.")
        if self.role == "matrix" and sum(axis != "layers" for axis in self.axes) < 2:
            raise ValueError(
                f"shape {self.shape} with axes {self.axes} has the role 'matrix', but "
                "a matrix is [*stack, in, out]; give it another role, such as 'scale' "
                "or 'bias'."
            )


def stack(specs: Any, count: int) -> Any:
    """The same parameters for `count` layers, stacked along a new leading axis."""

    def stack_one(spec: ParamSpec) -> ParamSpec:
        def init(key, shape, dtype):
            keys = jax.random.split(key, shape[0])
            return jax.vmap(lambda k: spec.init(k, shape[1:], dtype))(keys)

        return dataclasses.replace(
            spec,
            shape=(count, *spec.shape),
            axes=("layers", *spec.axes),
            init=init,
        )

    return jax.tree.map(stack_one, specs)


def init(specs: Any, key: Array) -> Any:
    """Arrays for a spec tree.

    Each parameter's key is `key` folded with a hash of its path, so adding or removing
    a parameter leaves the others unchanged. Under a mesh, jit this function with
    ``out_shardings=params.shardings(specs, mesh)``, and no device holds all of it.

    Args:
        specs: tree of `ParamSpec`.
        key: a PRNG key.

    Returns:
        A tree of arrays with the same structure.
    """

    def init_one(path, spec: ParamSpec) -> Array:
        leaf_key = jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
        return spec.init(leaf_key, spec.shape, spec.dtype)

    return jax.tree_util.tree_map_with_path(init_one, specs)


def abstract(specs: Any) -> Any:
    """`jax.ShapeDtypeStruct` for each parameter: shapes without memory."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs)


def count(specs: Any) -> int:
    """Number of scalars in a tree of specs or of arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(specs))


def check_pattern(pattern: str) -> None:
    """Raise ValueError if a pattern is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"The pattern {pattern!r} is no regular expression: {error}. A path as it "
            "is, such as 'blocks/0/w_q', is one; so is '.*'."
        ) from error


def select[T](specs: Any, rules: Sequence[tuple[str, T]]) -> Any:
    """Give every parameter the value of the first rule that matches it.

    Args:
        specs: tree of `ParamSpec`.
        rules: pairs ``(pattern, value)``. A pattern that is a role (``"matrix"``)
            matches every parameter of that role, any other is a regular expression
            that must match the whole path name (``"blocks/.*/w_[qk]"``, ``".*"``).

    Returns:
        A tree with the structure of `specs` and one value per parameter.

    Raises:
        ValueError: no rule covers a parameter, or a path pattern matches no parameter
            (nearly always a typing mistake); the message names them.
    """

    def matches(pattern: str, name: str, spec: ParamSpec) -> bool:
        if pattern in ROLES:
            return spec.role == pattern
        return re.fullmatch(pattern, name) is not None

    named = named_leaves(specs)
    for pattern, _ in rules:
        check_pattern(pattern)
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
