"""Checks of the arguments of paged attention."""

import numbers
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pallas_kernels.arguments import check_axes

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


def check_arrays(arrays: Mapping[str, jax.Array | None]) -> None:
    """Check dtypes and shapes, and the lengths and the table if they are known.

    Args:
        arrays: arguments by the names of `AXES`; a scale may be None or a scalar.
    """
    sizes, source = {}, {}
    for name, array in arrays.items():
        if array is None:
            continue
        _check_dtype(name, array.dtype)
        if name in SCALES and array.ndim == 0:
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
    keys, values = (jnp.asarray(arrays[f"{x}_pages"]).dtype for x in "kv")
    if keys != values:
        raise TypeError(
            f"{NAME}: k_pages has dtype {keys} and v_pages {values}, but they must "
            "have the same dtype."
        )
    if sizes["Hq"] % sizes["Hkv"]:
        raise ValueError(
            f"{NAME}: q has {sizes['Hq']} heads and k_pages {sizes['Hkv']}, but each "
            "head of keys must serve as many query heads: Hq must be a multiple of Hkv."
        )
    _check_values(arrays, sizes)


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


def _check_values(arrays, sizes):
    """Check lengths and table, if they are known before the program runs."""
    integers = [arrays[name] for name in INTEGERS]
    if any(isinstance(array, Tracer) for array in integers):
        return
    table, lengths, bounds = map(np.asarray, integers)
    if bounds[0] != 0 or np.any(np.diff(bounds) < 0) or bounds[-1] > sizes["Tq"]:
        raise ValueError(
            f"{NAME}: cu_q_lens is {bounds.tolist()}, but it must rise from 0 to at "
            f"most Tq = {sizes['Tq']} without falling: the start of each sequence's "
            "queries, and the end of the last one's."
        )
    room = sizes["pages_per_seq"] * sizes["page"]
    if np.any((lengths < 0) | (lengths > room)):
        raise ValueError(
            f"{NAME}: kv_lens is {lengths.tolist()}, but a sequence has between 0 and "
            f"pages_per_seq * page = {room} keys; give page_table more columns."
        )
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


def check_masks(window, soft_cap) -> None:
    """Check `window` and `soft_cap`."""
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
