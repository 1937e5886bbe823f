"""Checks of an operation's arguments, with error messages for the caller."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.errors import TracerArrayConversionError

INTEGERS = ("segment_ids", "cu_seqlens")
OPTIONAL = ("g", "D", "segment_ids", "cu_seqlens", "initial_state")
FLOATS = ("float32", "bfloat16", "float64")


def check_arrays(operation: str, axes: dict[str, str], *arguments) -> dict:
    """Convert the arguments to arrays, and check their dtypes and shapes.

    Args:
        axes: the axes of each argument by name, one letter per axis; equal letters are
          equal sizes. With `cu_seqlens` (Z = S + 1), S replaces B in "initial_state".
        arguments: one array for each name, in the same order; None where not given.

    Returns:
        The arrays by name.
    """
    arrays = {
        name: None
        if argument is None and name in OPTIONAL
        else as_array(operation, name, argument)
        for name, argument in zip(axes, arguments, strict=True)
    }
    ragged = arrays.get("cu_seqlens") is not None
    if ragged and arrays["segment_ids"] is not None:
        raise ValueError(
            f"{operation}: cu_seqlens and segment_ids both set where the state is "
            "reset; pass only one of them."
        )
    if ragged:
        axes = axes | {"initial_state": axes["initial_state"].replace("B", "S")}
    sizes, source = {}, {}
    for name, array in arrays.items():
        if array is None:
            continue
        check_dtype(operation, name, array.dtype)
        letters, shape = axes[name], array.shape
        rule = "[S + 1]" if name == "cu_seqlens" else f"[{', '.join(letters)}]"
        check_axes(operation, name, shape, letters, rule, sizes, source)
        if name == "cu_seqlens":
            sizes["S"], source["S"] = shape[0] - 1, name
    _check_sizes(operation, arrays, sizes, source)
    if ragged:
        _check_bounds(operation, arguments[list(axes).index("cu_seqlens")], sizes["T"])
    return arrays


def as_array(operation: str, name: str, argument) -> jax.Array:
    """Convert an argument to an array.

    Raises:
        TypeError: the argument is missing, or no array of numbers.
    """
    if argument is None:
        raise TypeError(f"{operation}: {name} is None, but it must be an array.")
    try:
        return jnp.asarray(argument)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(
            f"{operation}: {name} is of type {type(argument).__name__} and makes no "
            "array of numbers; give a jax.Array or a NumPy array."
        ) from None


def known(argument) -> np.ndarray | None:
    """The values of an argument; None where they are traced, or in other processes.

    Takes the caller's argument: under `jax.jit`, `as_array` traces what was known.
    """
    if isinstance(argument, Tracer):
        return None
    if isinstance(argument, jax.Array) and not argument.is_fully_addressable:
        return None
    try:
        return np.asarray(argument)
    except TracerArrayConversionError:  # a list of traced numbers
        return None


def check_axes(operation, name, shape, axes, rule, sizes, source) -> None:
    """Check a shape against named axes; equal names are equal sizes.

    Args:
        axes: the name of each axis.
        rule: the axes as shown in an error message.
        sizes, source: the size of every axis seen so far, and the argument that has it;
          the axes of this shape are added.
    """
    if len(shape) != len(axes):
        raise ValueError(
            f"{operation}: {name} has shape {shape}, but it must have the "
            f"{len(axes)} axes {rule}."
        )
    for axis, size in zip(axes, shape, strict=True):
        if size != sizes.setdefault(axis, size):
            raise ValueError(
                f"{operation}: {name} has shape {shape}, but it must be {rule} "
                f"with {axis} = {sizes[axis]} as in {source[axis]}."
            )
        source.setdefault(axis, name)


def check_dtype(operation, name, dtype) -> None:
    """Check the dtype of an argument: an integer for `INTEGERS`, else of `FLOATS`."""
    if name in INTEGERS:
        if not jnp.issubdtype(dtype, jnp.integer):
            raise TypeError(
                f"{operation}: {name} has dtype {dtype}, but it must hold integers."
            )
    elif dtype not in FLOATS:
        raise TypeError(
            f"{operation}: {name} has dtype {dtype}, but it must be one of "
            f"{', '.join(FLOATS)}; cast it first (states would overflow float16)."
        )


def _check_sizes(operation, arrays, sizes, source):
    for letter in sizes.keys() - {"T", "S", "Z"}:
        if sizes[letter] < 1:
            raise ValueError(
                f"{operation}: {letter} = {sizes[letter]} in {source[letter]}, but "
                "every axis other than time must have at least one entry."
            )
    if arrays.get("cu_seqlens") is None:
        return
    if sizes["S"] < 1:
        raise ValueError(
            f"{operation}: cu_seqlens has shape ({sizes['Z']},), but it must have "
            "S + 1 entries for S >= 1 sequences."
        )
    if sizes["B"] != 1:
        raise ValueError(
            f"{operation}: cu_seqlens divides the tokens of one batch row, but "
            f"{source['B']} has B = {sizes['B']}; put the sequences one after another "
            "in one row."
        )


def _check_bounds(operation, cu_seqlens, T):
    bounds = known(cu_seqlens)
    if bounds is None:
        return
    if bounds[0] != 0 or np.any(bounds[1:] < bounds[:-1]) or bounds[-1] > T:
        raise ValueError(
            f"{operation}: cu_seqlens is {bounds.tolist()}, but it must rise from 0 to "
            f"at most T = {T} without falling: the start of each sequence, and the end "
            "of the last."
        )


def check_scale(operation: str, name: str, scale) -> None:
    """Check a factor that is one number, or None.

    Raises:
        TypeError: it is no real number.
        ValueError: it has axes; or it is known and not finite.
    """
    if scale is None:
        return
    array = as_array(operation, name, scale)
    dtype, shape = array.dtype, array.shape
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(
            f"{operation}: {name} has dtype {dtype}, but it must be a real number; "
            "leave it out for the default."
        )
    if shape:
        raise ValueError(
            f"{operation}: {name} has shape {shape}, but it must be one number; where "
            "factors differ, multiply q by them."
        )
    value = known(scale)
    if value is not None and not np.isfinite(value):
        raise ValueError(
            f"{operation}: {name} is {value}, but it must be finite, or no result is."
        )


def check_settings(
    operation: str, chunk_size: int | None, precision
) -> tuple[int | None, jax.lax.Precision | None]:
    """Check `chunk_size`, and convert `precision` to a `jax.lax.Precision`."""
    if chunk_size is not None:
        if not isinstance(chunk_size, int) or isinstance(chunk_size, bool):
            raise TypeError(
                f"{operation}: chunk_size is {chunk_size!r}, but it must be an int, "
                "known before compilation, or None."
            )
        if chunk_size < 1:
            raise ValueError(
                f"{operation}: chunk_size is {chunk_size}, but a chunk has at least "
                "one token."
            )
    if precision is None:
        return chunk_size, None
    try:
        return chunk_size, jax.lax.Precision(precision)
    except (ValueError, TypeError):
        names = ", ".join(p.name.lower() for p in jax.lax.Precision)
        raise ValueError(
            f"{operation}: precision is {precision!r}, but it must be None, a "
            f"jax.lax.Precision or one of the names {names}."
        ) from None
