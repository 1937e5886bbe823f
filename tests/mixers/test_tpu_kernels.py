"""Mixers on the TPU kernels: one setting, and the same results and gradients."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import params
from jaxlab.mixers import delta_product, gla, mamba, mamba2, mixer_of, mom, retnet
from pallas_kernels import platform

WIDTH, B, T = 16, 2, 13
HEADS = {"n_heads": 2, "key_size": 64, "value_size": 64}

CASES = {
    "delta_product": delta_product.Config(WIDTH, **HEADS),
    "gated_delta_net": delta_product.Config(WIDTH, n_householders=1, **HEADS),
    "mom": mom.Config(WIDTH, **HEADS),
    "mom_linear": mom.Config(WIDTH, rule="gated_linear_attention", **HEADS),
    "gla": gla.Config(WIDTH, **HEADS),
    "retnet": retnet.Config(WIDTH, **HEADS),
    "mamba": mamba.Config(WIDTH, expand=8, n_states=8),
    "mamba2": mamba2.Config(WIDTH, expand=8, head_size=64, n_states=64),
}


def results(cfg, weights, x, segment_ids):
    """Outputs and state of packed documents, with the gradients."""
    mixer = mixer_of(cfg)
    state = mixer.init_state(cfg, B, T)

    # Interpreted kernels are long programs that run once: compiled as they are.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(weights, x):
        def outputs(weights, x):
            return mixer.forward(weights, x, cfg, segment_ids=segment_ids, state=state)

        found, pull_back = jax.vjp(outputs, weights, x)
        return found, pull_back(jax.tree.map(jnp.ones_like, found))

    return run(weights, x)


@pytest.mark.parametrize("name", CASES)
def test_a_mixer_runs_on_the_tpu_kernel(name):
    cfg = CASES[name]
    weights = params.init(mixer_of(cfg).spec(cfg), jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (B, T, WIDTH))
    ids = jnp.broadcast_to(jnp.asarray([0] * 5 + [1] * 6 + [-1] * 2), (B, T))
    want = results(cfg, weights, x, ids)
    on_tpu = dataclasses.replace(cfg, implementation="pallas_tpu")
    with platform.interpreted_tpu(uninitialized_memory="nan"):
        got = results(on_tpu, weights, x, ids)

    def close(a, b):
        scale = max(float(jnp.abs(b).max()), 1e-3)
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * scale)

    jax.tree.map(close, got, want)


def test_off_a_tpu_the_setting_is_refused():
    cfg = dataclasses.replace(CASES["gla"], implementation="pallas_tpu")
    weights = params.init(gla.spec(cfg), jax.random.key(0))
    with pytest.raises(NotImplementedError, match="runs on a TPU"):
        gla.forward(weights, jnp.ones((B, T, WIDTH)), cfg)
