"""Merging attention over disjoint parts of the keys."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.arguments import as_array, check_dtype
from pallas_kernels.paged_attention.operands import accumulation

NAME = "merge_partials"


def merge_partials(
    outputs: Sequence[Float[Array, "*rows D"]] | Float[Array, "N *rows D"],
    log_sum_exps: Sequence[Float[Array, "*rows"]] | Float[Array, "N *rows"],
) -> tuple[Float[Array, "*rows D"], Float[Array, "*rows"]]:
    """Combine attention over disjoint sets of keys; exact up to rounding.

        lse = log sum_n e^{lse_n}
        o = sum_n e^{lse_n - lse} o_n

    Args:
        outputs: N arrays [..., D], or one array with a leading axis N: the normalised
          attention of the same queries over each set of keys.
        log_sum_exps: N arrays [...], or one array with a leading axis N: the logarithm
          of each softmax's denominator, -inf where a query sees no key of the set; the
          output there is ignored.

    Returns:
        The attention over all keys [..., D] in the outputs' dtype, and its float32
        (float64 for float64) log-sum-exp [...]. A query that sees no key at all has
        output 0 and log-sum-exp -inf.

    Raises:
        ValueError: there is nothing to merge, or the shapes do not fit each other.
        TypeError: a part is no array of floating-point numbers.

    Reference: Juravsky et al., Hydragen, arXiv 2402.05099, section 3.2.
    """
    outputs = _arrays("outputs", outputs)
    log_sum_exps = _arrays("log_sum_exps", log_sum_exps)
    _check_shapes(outputs, log_sum_exps)
    o_NRD, lse_NR = jnp.stack(outputs), jnp.stack(log_sum_exps)
    dtype = accumulation(o_NRD.dtype)
    lse_NR = lse_NR.astype(dtype)
    largest = finite(lse_NR.max(0))
    weights = jnp.exp(lse_NR - largest[None])[..., None]
    total = weights.sum(0)
    # The output of a part without keys may be anything, even NaN.
    parts = jnp.where(weights > 0, weights * o_NRD.astype(dtype), 0.0)
    o = parts.sum(0) / jnp.where(total > 0, total, 1.0)
    return o.astype(o_NRD.dtype), largest + jnp.log(total[..., 0])


def _arrays(name: str, parts) -> list[Array]:
    """Convert each part to an array, and check its dtype."""
    if not isinstance(parts, list | tuple):
        parts = as_array(NAME, name, parts)
        if parts.ndim == 0:
            raise ValueError(
                f"{NAME}: {name} is one number, but it must be a list of arrays, or "
                "one array with a leading axis."
            )
    arrays = [as_array(NAME, f"{name}[{n}]", part) for n, part in enumerate(parts)]
    for n, array in enumerate(arrays):
        check_dtype(NAME, f"{name}[{n}]", array.dtype)
    return arrays


def _check_shapes(outputs: list[Array], log_sum_exps: list[Array]) -> None:
    if len(outputs) == 0 or len(outputs) != len(log_sum_exps):
        raise ValueError(
            f"{NAME}: there are {len(outputs)} outputs and {len(log_sum_exps)} "
            "log_sum_exps, but each part has one of both, and there must be a part."
        )
    shape = outputs[0].shape
    for o, lse in zip(outputs, log_sum_exps, strict=True):
        if o.ndim == 0 or o.shape != shape or o.shape[:-1] != lse.shape:
            raise ValueError(
                f"{NAME}: an output has shape {o.shape} and its log_sum_exp "
                f"{lse.shape}, but with the first output {shape} they must be {shape}, "
                f"[..., D], and {shape[:-1]}."
            )


def finite(largest: jax.Array) -> jax.Array:
    """Replace -inf by 0, which can be subtracted from -inf."""
    return jnp.where(largest == -jnp.inf, 0.0, largest)
