"""GLA, RetNet and Mamba-2 against loops in float64, written from their papers."""

import jax
import numpy as np
import pytest

from jaxlab import params
from jaxlab.mixers import gla, mamba2, mixer_of, retnet

B, T, WIDTH = 2, 70, 16  # more than one chunk


def initial(mixer, cfg, key):
    return jax.jit(lambda key: params.init(mixer.spec(cfg), key))(key)


def run(cfg):
    """The layer's output in float32; its input and parameters in float64.

    Biases, scales and decays are drawn, so that none is at a value that hides it.
    """
    mixer = mixer_of(cfg)
    p = initial(mixer, cfg, jax.random.key(3))
    rng = np.random.default_rng(4)
    for name, spec in mixer.spec(cfg).items():
        if spec.role in ("scale", "bias", "decay"):
            p[name] = p[name] + rng.standard_normal(spec.shape).astype(np.float32)
    x = rng.standard_normal((B, T, WIDTH)).astype(np.float32)
    y, _ = jax.jit(lambda p, x: mixer.forward(p, x, cfg))(p, x)
    return y, x.astype(np.float64), {n: np.asarray(a, float) for n, a in p.items()}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rms(x):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6)


def heads(x, H):
    return x.reshape(*x.shape[:-1], H, -1)


def close(y, want):
    error = np.linalg.norm(np.asarray(y, float) - want) / np.linalg.norm(want)
    assert error < 1e-5


@pytest.mark.parametrize("root", (16.0, 2.0))
def test_gla(root):
    cfg = gla.Config(WIDTH, n_heads=2, gate_root=root)
    y, x, p = run(cfg)
    S = np.zeros((B, 2, 4, 8))  # K is half of V
    want = np.zeros((B, T, WIDTH))
    for t in range(T):
        u = x[:, t]
        alpha = sigmoid(u @ p["w_decay_in"] @ p["w_decay_out"] + p["decay_bias"])
        alpha = heads(alpha ** (1 / root), 2)
        q, k, v = (heads(u @ p[f"w_{n}"], 2) for n in "qkv")
        S = alpha[..., None] * S + k[..., None] * v[..., None, :]
        o = rms(np.einsum("bhk,bhkv->bhv", q / 2, S)) * p["norm"]
        want[:, t] = (o.reshape(B, -1) * silu(u @ p["w_gate"])) @ p["w_o"]
    close(y, want)


def test_retnet_in_its_parallel_form():
    """Eq. 5: (Q K^T * D) V with D_nm = gamma^{n-m}, angles as complex numbers."""
    cfg = retnet.Config(WIDTH, n_heads=2)
    y, x, p = run(cfg)
    K = 8
    angle = np.arange(T)[:, None] * 10_000.0 ** (-np.arange(K // 2) / (K // 2))

    def rotated(a):  # channel pair (i, i + K/2) as one complex number
        a = heads(a, 2)
        return (a[..., : K // 2] + 1j * a[..., K // 2 :]) * np.exp(1j * angle)[:, None]

    q, k, v = rotated(x @ p["w_q"]), rotated(x @ p["w_k"]), heads(x @ p["w_v"], 2)
    assert v.shape[-1] == 2 * K
    distance = np.arange(T)[:, None] - np.arange(T)
    o = np.zeros(v.shape)
    for h, gamma in enumerate((1 - 1 / 32, 1 - 1 / 64)):
        D = np.where(distance >= 0, gamma ** np.maximum(distance, 0.0), 0)
        scores = np.einsum("bnk,bmk->bnm", q[:, :, h], k[:, :, h].conj()).real
        o[:, :, h] = (scores * D / K**0.5) @ v[:, :, h]
    o = (rms(o) * p["norm"]).reshape(B, T, -1)
    close(y, (o * silu(x @ p["w_gate"])) @ p["w_o"])


def test_retnet_counts_positions_in_the_document():
    """The place of a token is kept in the state, and starts anew in a new document."""
    cfg = retnet.Config(WIDTH, n_heads=2)
    p = initial(retnet, cfg, jax.random.key(0))
    x = np.random.default_rng(1).standard_normal((1, 7, WIDTH)).astype(np.float32)
    forward = jax.jit(retnet.forward, static_argnums=2)
    ids = np.array([[-1, 5, 5, 5, 9, 9, -1]])
    state = retnet.init_state(cfg, 1)
    for continued, length in ((ids, 2), (np.full_like(ids, 5), 9)):
        _, state = forward(p, x, cfg, state=state, segment_ids=continued)
        assert state.length.tolist() == [length]


@pytest.mark.parametrize("groups", (1, 2))
def test_mamba2(groups):
    cfg = mamba2.Config(WIDTH, head_size=8, n_states=5, n_groups=groups, convolution=3)
    y, x, p = run(cfg)
    H, P, N, C = 4, 8, 5, 32

    def convolved(name):
        a = x @ p[f"w_{name}"]
        taps, out = p[f"conv_{name}"], np.zeros(a.shape)
        for t in range(T):
            for back in range(min(3, t + 1)):
                out[:, t] += taps[2 - back] * a[:, t - back]
        return silu(out + p[f"conv_bias_{name}"])

    u, b, c = heads(convolved("x"), H), convolved("b"), convolved("c")
    z = silu(x @ p["w_z"])
    dt = np.logaddexp(0, x @ p["w_dt"] + p["dt_bias"])
    A = -np.exp(p["a_log"])
    state, want = np.zeros((B, H, N, P)), np.zeros((B, T, WIDTH))
    for t in range(T):
        o = np.zeros((B, H, P))
        for h in range(H):
            group = slice(N * (h * groups // H), N * (h * groups // H) + N)
            add = b[:, t, group, None] * (dt[:, t, h, None] * u[:, t, h])[:, None]
            state[:, h] *= np.exp(dt[:, t, h] * A[h])[:, None, None]
            state[:, h] += add
            o[:, h] = np.einsum("bn,bnp->bp", c[:, t, group], state[:, h])
            o[:, h] += p["d"][h] * u[:, t, h]
        gated = (o.reshape(B, C) * z[:, t]).reshape(B, groups, -1)
        want[:, t] = (rms(gated).reshape(B, C) * p["norm"]) @ p["w_out"]
    close(y, want)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gla.Config(30), "width=30 .* n_heads=4"),
        (lambda: gla.Config(20), "value size 5 is odd"),
        (lambda: gla.Config(32, gate_rank=0), "gate_rank=0 must be"),
        (lambda: gla.Config(32, gate_root=0), "gate_root=0 must be above"),
        (lambda: retnet.Config(30), "width=30 .* n_heads=4"),
        (lambda: retnet.Config(32, key_size=3), "key_size=3 must be even"),
        (lambda: retnet.Config(32, value_size=0), "value_size=0 must be"),
        (lambda: mamba2.Config(16), "32 channels .* head_size=64"),
        (lambda: mamba2.Config(64, n_groups=3), "2 heads .* n_groups=3"),
        (lambda: mamba2.Config(64, convolution=0), "convolution=0 must be"),
    ],
)
def test_bad_configs(make, message):
    with pytest.raises(ValueError, match=message):
        make()
