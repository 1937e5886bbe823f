"""Merging attention over disjoint parts of the keys."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.paged_attention.operands import accumulation


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

    Reference: Juravsky et al., Hydragen, arXiv 2402.05099, section 3.2.
    """
    if len(outputs) == 0 or len(outputs) != len(log_sum_exps):
        raise ValueError(
            f"merge_partials: there are {len(outputs)} outputs and {len(log_sum_exps)} "
            "log_sum_exps, but each part has one of both, and there must be a part."
        )
    for o, lse in zip(outputs, log_sum_exps, strict=True):
        if o.shape != outputs[0].shape or o.shape[:-1] != lse.shape:
            raise ValueError(
                f"merge_partials: an output has shape {o.shape} and its log_sum_exp "
                f"{lse.shape}, but with the first output {outputs[0].shape} they must "
                f"be {outputs[0].shape} and {outputs[0].shape[:-1]}."
            )
    o_NRD, lse_NR = jnp.stack(tuple(outputs)), jnp.stack(tuple(log_sum_exps))
    dtype = accumulation(o_NRD.dtype)
    lse_NR = lse_NR.astype(dtype)
    largest = finite(lse_NR.max(0))
    weights = jnp.exp(lse_NR - largest[None])[..., None]
    total = weights.sum(0)
    # The output of a part without keys may be anything, even NaN.
    parts = jnp.where(weights > 0, weights * o_NRD.astype(dtype), 0.0)
    o = parts.sum(0) / jnp.where(total > 0, total, 1.0)
    return o.astype(o_NRD.dtype), largest + jnp.log(total[..., 0])


def finite(largest: jax.Array) -> jax.Array:
    """Replace -inf by 0, which can be subtracted from -inf."""
    return jnp.where(largest == -jnp.inf, 0.0, largest)
