"""Run the selective scan with its gradients; its law is `delta_rule_law.assert_law`."""

from functools import partial

import jax
import numpy as np
import selective_scan_oracle as oracle

import pallas_kernels
from pallas_kernels.selective_scan import cases


def run(inputs, implementation, *, segment_ids=None, cu_seqlens=None, chunk_size=None):
    """Results and gradients by the names of the oracle, in numpy float64."""
    operands = {name: inputs[name] for name in oracle.OPERANDS}
    streams = {"segment_ids": segment_ids, "cu_seqlens": cu_seqlens}
    results = _run(
        operands, inputs["d_y"], inputs["d_state"], streams, implementation, chunk_size
    )
    return {name: np.asarray(a, np.float64) for name, a in results.items()}


@partial(jax.jit, static_argnums=(4, 5))
def _run(operands, d_y, d_state, streams, implementation, chunk_size):
    def scan(operands):
        return pallas_kernels.selective_scan(
            **operands, **streams, implementation=implementation, chunk_size=chunk_size
        )

    (y, state), pullback = jax.vjp(scan, operands)
    (gradients,) = pullback((d_y.astype(y.dtype), d_state.astype(state.dtype)))
    results = {"y": y, "state": state}
    return results | {f"d_{name}": a for name, a in gradients.items()}


def small(B=2, T=150, E=24, N=4):
    """A small shape, off every block size."""
    return cases.Shape(B, T, E, N)
