"""Run a recurrence with its gradients, and the law its roundings obey."""

from functools import partial

import jax
import numpy as np

import pallas_kernels
from pallas_kernels.delta_rule import cases

EPS = float(np.finfo(np.float32).eps)


def run(
    inputs,
    implementation,
    *,
    segment_ids=None,
    cu_seqlens=None,
    chunk_size=None,
    operation=pallas_kernels.delta_product,
):
    """Results and gradients by the names of the oracle, in numpy float64."""
    operands = {
        name: x
        for name, x in inputs.items()
        if x is not None and name not in ("d_o", "d_state")
    }
    streams = {"segment_ids": segment_ids, "cu_seqlens": cu_seqlens}
    results = _run(
        *(operation, implementation, chunk_size),
        *(operands, inputs["d_o"], inputs["d_state"], streams),
    )
    return {name: np.asarray(x, np.float64) for name, x in results.items()}


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(operation, implementation, chunk_size, operands, d_o, d_state, streams):
    def f(operands):
        return operation(
            **operands, **streams, implementation=implementation, chunk_size=chunk_size
        )

    (o, state), pullback = jax.vjp(f, operands)
    (gradients,) = pullback((d_o.astype(o.dtype), d_state.astype(state.dtype)))
    results = {"o": o, "state": state}
    return results | {f"d_{name}": x for name, x in gradients.items()}


def error(got, want):
    """Relative error in the Euclidean norm; absolute where all should be zero."""
    scale = np.linalg.norm(want)
    return np.linalg.norm(got - want) / (scale if scale > 0 else 1.0)


def assert_law(got, reference, want):
    """At most 4 times the error of the token recurrence in the same precision.

    The floor of 8 roundings is for inputs on which the recurrence happens to make
    almost none, as it does where every state is forgotten at once.
    """
    assert got.keys() == want.keys()
    for name in want:
        bound = max(4 * error(reference[name], want[name]), 8 * EPS)
        assert error(got[name], want[name]) <= bound, name


def small(B=2, T=150, N=1, H=2, K=16, V=12):
    """A small shape, off every block size."""
    return cases.Shape(B, T, N, H, K, V)
