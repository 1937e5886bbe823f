"""Run paged attention, and check the law that every implementation obeys."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import block_sizes, paged_attention


@functools.cache
def compiled(sizes=None, **settings):
    """`paged_attention` with the log-sum-exp, compiled for these block sizes."""
    form = "tpu" if settings["implementation"] == "pallas_tpu" else "blocked"
    chosen = getattr(block_sizes, form) if sizes is None else lambda *_: sizes

    def call(**arrays):
        with mock.patch.object(block_sizes, form, chosen):
            return paged_attention(**arrays, **settings, return_log_sum_exp=True)

    return jax.jit(call)


def assert_law(got, want, sequences):
    """Check that float32 is within 2e-6 sqrt(length) of the oracle for unit values."""
    lengths = [keys for queries, keys in sequences for _ in range(queries)]
    lengths += [1] * (len(want[0]) - len(lengths))
    bound = 2e-6 * np.sqrt(np.maximum(lengths, 1))[:, None]
    o, lse = map(np.asarray, got)
    assert o.dtype == lse.dtype == np.float32
    assert np.all(np.abs(o - want[0]) <= bound[..., None])
    no_keys = np.isneginf(want[1])
    np.testing.assert_array_equal(np.isneginf(lse), no_keys)
    lse, exact = (np.where(no_keys, 0.0, x) for x in (lse, want[1]))
    assert np.all(np.abs(lse - exact) <= bound)


def bfloat16_error(arrays, want, **settings):
    """The norm of the error of the bfloat16 output."""
    o, lse = compiled(**settings)(**arrays)
    assert o.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    return np.linalg.norm(np.asarray(o, np.float64) - want)
