"""Mixers on the kernels: one setting, and the same results and gradients."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import params
from jaxlab.mixers import delta_product, gla, mamba, mamba2, mixer_of, mom, retnet
from pallas_kernels import platform

WIDTH, B, T = 16, 2, 13
HEADS = {"n_heads": 2, "key_size": 64, "value_size": 64}
IDS = np.asarray([[0] * 5 + [1] * 6 + [-1] * 2] * B)

CASES = {
    "delta_product": delta_product.Config(WIDTH, **HEADS),
    "gated_delta_net": delta_product.Config(WIDTH, n_householders=1, **HEADS),
    "mom": mom.Config(WIDTH, n_memories=3, top_k=2, **HEADS),
    "mom_linear": mom.Config(
        WIDTH, n_memories=3, top_k=2, rule="gated_linear_attention", **HEADS
    ),
    "gla": gla.Config(WIDTH, **HEADS),
    "retnet": retnet.Config(WIDTH, **HEADS),
    "mamba": mamba.Config(WIDTH, expand=8, n_states=8),
    "mamba2": mamba2.Config(WIDTH, expand=8, head_size=64, n_states=64),
}


@cache  # what runs in plain JAX is compared with both kernels
def results(cfg, dtype=jnp.float32):
    """Of packed documents with the gradients, and of a decode step after them."""
    mixer = mixer_of(cfg)
    weights = params.init(mixer.spec(cfg), jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (B, T, WIDTH)).astype(dtype)
    state = mixer.init_state(cfg, B, T, dtype)

    # Interpreted kernels are long programs that run once: compiled as they are.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(weights, x):
        def outputs(weights, x):
            return mixer.forward(weights, x, cfg, segment_ids=IDS, state=state)

        found, pull_back = jax.vjp(outputs, weights, x)
        gradients = pull_back(jax.tree.map(jnp.ones_like, found))
        return found, gradients, mixer.step(weights, x[:, 0], cfg, found[1])

    return jax.tree.map(lambda a: np.asarray(a, np.float32), run(weights, x))


@pytest.mark.parametrize("name", CASES)
def test_a_mixer_runs_on_the_tpu_kernel(name):
    want = results(CASES[name])
    on_tpu = dataclasses.replace(CASES[name], implementation="pallas_tpu")
    with platform.interpreted_tpu(uninitialized_memory="nan"):
        got = results(on_tpu)

    def close(a, b):
        scale = max(np.abs(b).max(), 1e-3)
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * scale)

    jax.tree.map(close, got, want)


@pytest.mark.parametrize("name", ("delta_product", "gated_delta_net", "mom"))
def test_a_mixer_runs_on_the_gpu_kernel(name):
    """In bfloat16, as far from float32 as plain JAX in bfloat16 is, or half more."""
    exact, chunked = results(CASES[name]), results(CASES[name], jnp.bfloat16)
    on_gpu = dataclasses.replace(CASES[name], implementation="pallas_gpu")
    with platform.interpreted_gpu():
        got = results(on_gpu, jnp.bfloat16)

    def near(a, b, c):
        bound = 1.5 * np.linalg.norm(b - c) + 2**-8 * np.linalg.norm(c)
        assert np.linalg.norm(a - c) <= bound

    jax.tree.map(near, got, chunked, exact)


@pytest.mark.parametrize("name", CASES)
def test_off_its_device_the_setting_is_refused(name):
    cfg = dataclasses.replace(CASES[name], implementation="pallas_tpu")
    mixer = mixer_of(cfg)
    weights, x = params.abstract(mixer.spec(cfg)), jnp.ones((B, T, WIDTH))
    state = mixer.init_state(cfg, B, T)
    with pytest.raises(NotImplementedError, match="runs on a TPU"):
        jax.eval_shape(partial(mixer.forward, cfg=cfg), weights, x)
    with pytest.raises(NotImplementedError, match="runs on a TPU"):
        jax.eval_shape(partial(mixer.step, cfg=cfg), weights, x[:, 0], state=state)
