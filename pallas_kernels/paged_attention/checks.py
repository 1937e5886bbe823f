"""Checks of the arguments of paged attention."""

import numbers

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.arguments import as_array, check_axes, check_scale, known

NAME = "paged_attention"

# The names of every argument's axes; equal names are equal sizes.
AXES = {
    "q": ("Tq", "Hq", "D"),
    "k_pages": ("P", "page", "Hkv", "D"),
    "v_pages": ("P", "page", "Hkv", "D"),
    "page_table": ("S", "pages_per_seq"),
    "kv_lens": ("S",),
    "cu_q_lens": ("S + 1",),
    "k_scale": ("P", "page", "Hkv"),
    "v_scale": ("P", "page", "Hkv"),
}
INTEGERS = ("page_table", "kv_lens", "cu_q_lens")
SCALES = ("k_scale", "v_scale")
PLAIN = ("float32", "bfloat16", "float64")
QUANTISED = ("int8", "float8_e4m3fn", "float8_e5m2")


def check_arrays(**arguments) -> dict[str, jax.Array | None]:
    """Convert the arguments to arrays, and check their dtypes, shapes and known values.

    Args:
        arguments: by the names of `AXES`; a scale may be None or a scalar.

    Returns:
        The arrays by name.
    """
    arrays = {
        name: None
        if argument is None and name in SCALES
        else as_array(NAME, name, argument)
        for name, argument in arguments.items()
    }
    sizes, source = {}, {}
    for name, array in arrays.items():
        if array is None:
            continue
        _check_dtype(name, array.dtype)
        if name in SCALES and array.ndim == 0:
            check_scale(NAME, name, arguments[name])
            continue
        axes, shape = AXES[name], array.shape
        rule = f"[{', '.join(axes)}]"
        rule += " or a scalar" if name in SCALES else ""
        check_axes(NAME, name, shape, axes, rule, sizes, source)
        for axis, size in zip(axes, shape, strict=True):
            if size < 1 and axis != "Tq":
                raise ValueError(
                    f"{NAME}: {name} has shape {shape}, but every axis other than the "
                    "tokens' must have at least one entry."
                )
        if name == "kv_lens":
            sizes["S + 1"], source["S + 1"] = shape[0] + 1, name
    _check_pages(arrays)
    if sizes["Hq"] % sizes["Hkv"]:
        raise ValueError(
            f"{NAME}: q has {sizes['Hq']} heads and k_pages {sizes['Hkv']}, but each "
            "head of keys must serve as many query heads: Hq must be a multiple of Hkv."
        )
    table, lengths, bounds = (known(arguments[name]) for name in INTEGERS)
    _check_lengths(lengths, bounds, sizes)
    _check_table(table, lengths, bounds, sizes)
    return arrays


def _check_pages(arrays):
    """Check that the pages have one dtype, and scales if they need or can have them."""
    keys, values = (arrays[f"{x}_pages"].dtype for x in "kv")
    if keys != values:
        raise TypeError(
            f"{NAME}: k_pages has dtype {keys} and v_pages {values}, but they must "
            "have the same dtype."
        )
    for name in SCALES:
        if keys == "int8" and arrays[name] is None:
            raise ValueError(
                f"{NAME}: the pages are int8 and {name} is None, but integers stand "
                "for numbers only with a scale; give the one they were divided by."
            )
        if str(keys) in PLAIN and arrays[name] is not None:
            raise ValueError(
                f"{NAME}: {name} is given, but the pages are {keys}, whose numbers "
                "stand for themselves; leave it out, or quantise the pages."
            )


def _check_dtype(name, dtype):
    if name in INTEGERS:
        if not jnp.issubdtype(dtype, jnp.integer):
            raise TypeError(
                f"{NAME}: {name} has dtype {dtype}, but it must hold integers."
            )
        return
    allowed = PLAIN + QUANTISED if name in ("k_pages", "v_pages") else PLAIN
    if str(dtype) not in allowed:
        raise TypeError(
            f"{NAME}: {name} has dtype {dtype}, but it must be one of "
            f"{', '.join(allowed)}; cast it first (scores would overflow float16)."
        )


def _check_lengths(lengths, bounds, sizes):
    """Check the numbers of keys and queries, as far as they are known."""
    if bounds is not None and (
        bounds[0] != 0 or np.any(bounds[1:] < bounds[:-1]) or bounds[-1] > sizes["Tq"]
    ):
        raise ValueError(
            f"{NAME}: cu_q_lens is {bounds.tolist()}, but it must rise from 0 to at "
            f"most Tq = {sizes['Tq']} without falling: the start of each sequence's "
            "queries, and the end of the last one's."
        )
    room = sizes["pages_per_seq"] * sizes["page"]
    if lengths is not None and np.any((lengths < 0) | (lengths > room)):
        raise ValueError(
            f"{NAME}: kv_lens is {lengths.tolist()}, but a sequence has between 0 and "
            f"pages_per_seq * page = {room} keys; give page_table more columns."
        )
    if lengths is None or bounds is None:
        return
    queries = np.diff(bounds)
    wrong = (queries > lengths) & (lengths > 0)  # without keys it gets 0
    if wrong.any():
        s = np.argmax(wrong)
        raise ValueError(
            f"{NAME}: sequence {s} has {queries[s]} queries and {lengths[s]} keys, but "
            "kv_lens counts the keys of the new tokens too; write these to the pages "
            "first, and add their number."
        )


def _check_table(table, lengths, bounds, sizes):
    """Check the pages that are read, if it is known which."""
    if table is None or lengths is None or bounds is None:
        return
    has_queries = np.diff(bounds)[:, None] > 0
    starts = np.arange(sizes["pages_per_seq"])[None] * sizes["page"]
    live = (starts < lengths[:, None]) & has_queries
    wrong = live & ((table < 0) | (table >= sizes["P"]))
    if wrong.any():
        s, i = np.argwhere(wrong)[0]
        raise ValueError(
            f"{NAME}: page_table[{s}, {i}] is {table[s, i]}, but sequence {s} has "
            f"{lengths[s]} keys there, and the pages are 0 to {sizes['P'] - 1}."
        )


def check_settings(scale, window, soft_cap, return_log_sum_exp) -> None:
    """Check all that are not arrays of the cache."""
    check_scale(NAME, "scale", scale)
    if not isinstance(return_log_sum_exp, bool):
        raise TypeError(
            f"{NAME}: return_log_sum_exp is {return_log_sum_exp!r}, but it must be "
            "True or False."
        )
    if window is not None:
        if not isinstance(window, numbers.Integral) or isinstance(window, bool):
            raise TypeError(
                f"{NAME}: window is {window!r}, but it must be an int, known before "
                "compilation, or None."
            )
        if window < 1:
            raise ValueError(
                f"{NAME}: window is {window}, but a query sees at least itself: give 1 "
                "or more, or None for all keys."
            )
    if soft_cap is not None:
        if not isinstance(soft_cap, numbers.Real) or isinstance(soft_cap, bool):
            raise TypeError(
                f"{NAME}: soft_cap is {soft_cap!r}, but it must be a float, known "
                "before compilation, or None."
            )
        if not 0 < float(soft_cap) < float("inf"):
            raise ValueError(
                f"{NAME}: soft_cap is {soft_cap}, but it must be above 0 and finite; "
                "None leaves the scores unbounded."
            )
