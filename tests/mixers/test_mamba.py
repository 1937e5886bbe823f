"""Mamba against the paper's equations, token by token in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import params
from jaxlab.mixers import mamba
from jaxlab.optimizers.recipe import DECAYED

forward = jax.jit(mamba.forward, static_argnums=2)


def initial(cfg, key):
    return jax.jit(lambda key: params.init(mamba.spec(cfg), key))(key)


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer(p, u, n_states, dt_rank):
    """One row u [T, width]; equations of the module's docstring, in loops."""
    taps, E = p["conv"].shape
    h = np.zeros((E, n_states))
    A = -np.exp(p["a_log"])
    inputs, y = [np.zeros(E)] * (taps - 1), []
    for u_t in u:
        inputs.append(u_t @ p["w_x"])
        x = p["conv_bias"] + sum(p["conv"][j] * inputs[j - taps] for j in range(taps))
        x = x * sigmoid(x)
        r, B, C = np.split(x @ p["w_select"], [dt_rank, dt_rank + n_states])
        dt = np.log1p(np.exp(r @ p["w_dt"] + p["dt_bias"]))
        for e in range(E):
            h[e] = np.exp(dt[e] * A[e]) * h[e] + dt[e] * B * x[e]
        z = u_t @ p["w_z"]
        y.append(((h @ C + p["d"] * x) * z * sigmoid(z)) @ p["w_out"])
    return np.array(y)


@pytest.mark.parametrize(
    "cfg",
    [
        mamba.Config(24, n_states=4),
        mamba.Config(24, expand=1, n_states=3, dt_rank=5, convolution=1, chunk_size=4),
    ],
)
def test_layer_is_the_papers(cfg, key):
    p = jax.device_get(initial(cfg, key))
    for name in ("a_log", "d", "dt_bias", "conv_bias"):  # off their starting values
        p[name] = p[name] + np.float32(0.3) * normal(*p[name].shape)
    u = normal(2, 9, 24)
    y, _ = forward(p, u, cfg)
    exact = {name: np.asarray(w, np.float64) for name, w in p.items()}
    for row in range(2):
        want = layer(exact, np.asarray(u[row], np.float64), cfg.n_states, cfg.R)
        np.testing.assert_allclose(np.asarray(y)[row], want, rtol=2e-5, atol=2e-6)


def test_start_of_training(key):
    """Rates -1 .. -N; dt log-uniform in [0.001, 0.1] around zero input; D of ones."""
    cfg = mamba.Config(512)
    p = jax.device_get(initial(cfg, key))
    assert (cfg.E, cfg.R, cfg.n_states) == (1024, 32, 16)
    np.testing.assert_allclose(
        np.exp(p["a_log"]), np.broadcast_to(np.arange(1, 17), (1024, 16)), rtol=1e-6
    )
    log_dt = np.log10(np.log1p(np.exp(p["dt_bias"])))
    assert -3.001 < log_dt.min() < -2.95 and -1.05 < log_dt.max() < -0.999
    assert abs(log_dt.mean() + 2) < 0.06
    assert np.all(p["d"] == 1)
    bound = 32**-0.5
    assert 0.95 * bound < np.abs(p["w_dt"]).max() <= bound
    assert mamba.Config(100).R == 7  # 6.25, rounded up


def test_what_sets_the_memory_is_not_decayed():
    decayed = params.select(mamba.spec(mamba.Config(16)), DECAYED)
    assert sorted(name for name, yes in decayed.items() if yes) == [
        *("w_dt", "w_out", "w_select", "w_x", "w_z")
    ]


def test_steps_of_bfloat16_activations_are_float32(key):
    """In bfloat16, dt = 0.001 e^x would move in jumps of 2^-8 of itself."""
    cfg = mamba.Config(16)
    p = params.init(mamba.spec(cfg), key)
    dt, B, C = mamba._select(p, jnp.ones((1, 2, 32), jnp.bfloat16), cfg)
    assert dt.dtype == jnp.float32
    assert B.dtype == C.dtype == jnp.bfloat16
    np.testing.assert_array_equal(dt[:, 0], dt[:, 1])
    assert np.any(dt != dt.astype(jnp.bfloat16).astype(jnp.float32))


def test_selection_ignores_and_keeps(key):
    """dt near 0 keeps the state as it is; a large dt forgets all that came before."""
    cfg = mamba.Config(16, n_states=4)
    p, x = jax.device_get(initial(cfg, key)), normal(1, 8, 16)
    state = mamba.init_state(cfg, 1)
    _, state = jax.device_get(forward(p, x, cfg, state=state))

    closed = p | {"dt_bias": np.full_like(p["dt_bias"], -40.0)}
    _, kept = forward(closed, x, cfg, state=state)
    np.testing.assert_allclose(kept.memory, state.memory, rtol=1e-5)

    wide_open = p | {"dt_bias": np.full_like(p["dt_bias"], 200.0)}
    other = state.replace(memory=state.memory + np.float32(1))
    _, after = forward(wide_open, x, cfg, state=state)
    _, same = forward(wide_open, x, cfg, state=other)
    np.testing.assert_array_equal(after.memory, same.memory)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mamba.Config(0), "width=0 must be at least 1"),
        (lambda: mamba.Config(16, n_states=0), "n_states=0 must be"),
        (lambda: mamba.Config(16, expand=0), "expand=0 must be"),
        (lambda: mamba.Config(16, dt_rank=0), "dt_rank=0 must be"),
        (lambda: mamba.Config(16, convolution=0), "convolution=0 must be"),
    ],
)
def test_bad_configs(make, message):
    with pytest.raises(ValueError, match=message):
        make()
