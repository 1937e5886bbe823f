"""LaCT: a float64 oracle of the layer, masks of every order, decoding, errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import params
from jaxlab.mixers import lact
from jaxlab.mixers.lact.fast_weights import NEWTON_SCHULZ, FastWeights, Rule
from jaxlab.mixers.lact.ttt_scan import ttt_scan

WIDTH, B, C = 16, 2, 4
BASE = lact.Config(WIDTH, n_heads=4, n_fast_heads=2, chunk_size=C, base_lr=0.05)

CONFIGS = {
    "muon": BASE,
    "pre_wide": dataclasses.replace(
        BASE, norm_placement="pre", inter_multi=2, newton_schulz="paper", window=6
    ),
    "gradient_descent": dataclasses.replace(
        BASE, optimizer="gradient_descent", momentum=False, norm_placement="none"
    ),
    "attention_scale": dataclasses.replace(
        BASE, scale_placement="attention", fast_rope=False, value_silu=False
    ),
}


@functools.cache
def setup(cfg, T=13):
    """Parameters moved away from their simple starts (ones and zeros), and inputs."""
    p = params.init(lact.spec(cfg), jax.random.key(11))
    keys = jax.random.split(jax.random.key(12), len(p))
    p = {
        name: w + (0.3 * jax.random.normal(key, w.shape) if w.ndim == 1 else 0)
        for key, (name, w) in zip(keys, p.items(), strict=True)
    }
    return p, jax.random.normal(jax.random.key(13), (B, T, WIDTH))


@functools.cache
def functions(cfg):
    return (
        jax.jit(functools.partial(lact.forward, cfg=cfg)),
        jax.jit(functools.partial(lact.step, cfg=cfg)),
    )


# The oracle: float64, one row, one document, a loop over chunks; matrices [out, in].


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def turned(x, base):
    """Rotary positions of [T, heads, size]."""
    T, _, size = x.shape
    angle = np.arange(T)[:, None] * base ** (-np.arange(size // 2) / (size // 2))
    z = x[..., : size // 2] + 1j * x[..., size // 2 :]
    z = z * np.exp(1j * angle)[:, None]
    return np.concatenate([z.real, z.imag], axis=-1)


def orthogonalised(G, coefficients):
    X = (G if G.shape[0] <= G.shape[1] else G.T) / (np.linalg.norm(G) + 1e-7)
    for a, b, c in coefficients:
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X if G.shape[0] <= G.shape[1] else X.T


def with_norms(W, W0):
    return [
        w
        / np.linalg.norm(w, axis=1, keepdims=True)
        * np.linalg.norm(w0, axis=1, keepdims=True)
        for w, w0 in zip(W, W0, strict=True)
    ]


def fast_head(cfg, W0, q, k, v, eta, beta):
    """One head: [T, D] in and out; W0 is (gate, down, up) in the order of the code."""
    W = [w.copy() for w in W0]
    M = [np.zeros_like(w) for w in W0]
    o = np.zeros_like(v)
    for start in range(0, len(q), C):
        t = slice(start, start + C)
        pre = cfg.norm_placement == "pre"
        w0, w1, w2 = with_norms(W, W0) if pre else W
        for i in range(len(q))[t]:
            o[i] = w1 @ (silu(w0 @ q[i]) * (w2 @ q[i]))
        if start + C > len(q):
            break
        D = [np.zeros_like(w) for w in W0]
        for i in range(len(q))[t]:
            a, u, g = w0 @ k[i], w2 @ k[i], w1.T @ v[i]
            s = sigmoid(a)
            D[0] += eta[i, 0] * np.outer(g * u * s * (1 + a * (1 - s)), k[i])
            D[1] += eta[i, 2] * np.outer(v[i], silu(a) * u)
            D[2] += eta[i, 1] * np.outer(g * silu(a), k[i])
        if cfg.momentum:
            M = D = [beta[t].mean() * m + d for m, d in zip(M, D, strict=True)]
        if cfg.optimizer == "muon":
            coefficients = NEWTON_SCHULZ[cfg.newton_schulz]
            D = [orthogonalised(d, coefficients) for d in D]
        W = [w + d for w, d in zip(W, D, strict=True)]
        if cfg.norm_placement == "post":
            W = with_norms(W, W0)
    return o


def oracle(cfg, p, x):
    """The layer on one document [T, width]."""
    p = {name: np.asarray(w, np.float64) for name, w in p.items()}
    x = np.asarray(x, np.float64)
    T, N, H = len(x), cfg.n_heads, cfg.n_fast_heads
    q, k, v = x @ p["w_q"], x @ p["w_k"], x @ p["w_v"]
    scaled = q * p["q_scale"] + p["q_offset"], k * p["k_scale"] + p["k_offset"]
    on_fast = cfg.scale_placement == "fast"
    fast_q, fast_k = scaled if on_fast else (q, k)
    q, k = (q, k) if on_fast else scaled

    q, k = (turned(a.reshape(T, N, -1), cfg.rope_base) for a in (q, k))
    heads = v.reshape(T, N, -1)
    o_window = np.zeros_like(heads)
    for t in range(T):
        seen = slice(max(0, t - (cfg.window or C) + 1), t + 1)
        for n in range(N):
            score = k[seen, n] @ q[t, n] / np.sqrt(WIDTH // N)
            weight = np.exp(score - score.max())
            o_window[t, n] = weight / weight.sum() @ heads[seen, n]

    def unit(a):
        a = silu(a).reshape(T, H, -1)
        a = a / np.linalg.norm(a, axis=-1, keepdims=True)
        if cfg.fast_rope:
            a = turned(a.reshape(T, N, -1), cfg.rope_base)
        return a.reshape(T, H, -1)

    fast_q, fast_k = unit(fast_q), unit(fast_k)
    fast_v = (silu(v) if cfg.value_silu else v).reshape(T, H, -1)
    start = np.log(np.expm1(cfg.base_lr))
    eta = np.log1p(np.exp(x @ p["w_lr"] + p["b_lr"] + start)).reshape(T, H, 3)
    beta = np.zeros((T, H))
    if cfg.momentum:
        beta = sigmoid(x @ p["w_momentum"] + p["b_momentum"])
    scale = silu(x @ p["w_scale"] + p["b_scale"])

    D, F = WIDTH // H, cfg.inter_multi * WIDTH // H
    o = o_window.reshape(T, -1)
    for h in range(H):
        W0 = [
            p["fast_gate"][:, h * F : (h + 1) * F].T,
            p["fast_down"][:, h * D : (h + 1) * D].T,
            p["fast_up"][:, h * F : (h + 1) * F].T,
        ]
        y = fast_head(cfg, W0, fast_q[:, h], fast_k[:, h], fast_v[:, h],
                      eta[:, h], beta[:, h])  # fmt: skip
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * p["norm"]
        o[:, h * D : (h + 1) * D] += y * scale[:, h, None]
    return o @ p["w_o"]


@pytest.mark.parametrize("name", CONFIGS)
def test_layer_equals_the_oracle(name):
    """Float32 against float64; Muon lifts rounding in empty directions by 490."""
    cfg = CONFIGS[name]
    p, x = setup(cfg)
    y, _ = functions(cfg)[0](p, x)
    expected = np.stack([oracle(cfg, p, row) for row in x])
    tolerance = 1e-5 if cfg.optimizer == "gradient_descent" else 2e-4
    np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance)


def test_the_fast_branch_matters():
    """The oracle's agreement says nothing if attention drowns it."""
    p, x = setup(BASE)
    y, _ = functions(BASE)[0](p, x)
    off = p | {"norm": 0 * p["norm"]}
    assert jnp.linalg.norm(functions(BASE)[0](off, x)[0] - y) > 0.3 * jnp.linalg.norm(y)


# Which tokens may depend on which


def reaches(order, writes=None, T=11):
    """[T, T]: does the output at the first index depend on the token at the second?"""
    keys = jax.random.split(jax.random.key(3), 6)
    H, D = 1, 6
    shapes = [(H, D, D)] * 3
    W = FastWeights(*(jax.random.normal(k, s) for k, s in zip(keys, shapes)))  # noqa: B905
    k, v, q = (jax.random.normal(key, (1, T, H, D)) for key in keys[3:])
    eta = jnp.ones((1, T, H, 3))
    beta = jnp.full((1, T, H), 0.5)
    rule = Rule("gradient_descent", "none")
    if writes is not None:
        writes = jnp.array(writes)[None]

    def outputs(k):
        run = functools.partial(ttt_scan, chunk_size=C, rule=rule, order=order)
        return run(W, q, k, v, eta, beta, writes=writes)[0][0, :, 0]

    moved = jax.vmap(lambda t: k.at[0, t].add(1.0))(jnp.arange(T))
    # All in one batch: other shapes may round otherwise.
    same, *changed = jax.jit(jax.vmap(outputs))(jnp.concatenate([k[None], moved]))
    return np.stack([np.any(o != same, axis=-1) for o in changed], axis=1)


chunk = np.arange(11) // C


def test_apply_update_sees_earlier_chunks():
    np.testing.assert_array_equal(
        reaches("apply_update"), chunk[:, None] > chunk[None, :]
    )


def test_update_apply_sees_its_own_chunk_too():
    np.testing.assert_array_equal(
        reaches("update_apply"), chunk[:, None] >= chunk[None, :]
    )


def test_update_all_sees_everything():
    assert np.all(reaches("update_all"))


def test_strided_sees_the_tokens_that_write():
    """The second chunk writes nothing and leaves weights and momentum alone."""
    writes = np.array([1, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1], bool)
    np.testing.assert_array_equal(
        reaches("strided", writes), (chunk[:, None] >= chunk[None, :]) & writes
    )


@pytest.mark.parametrize(("T", "steps"), [(4, 0), (5, 1), (8, 1), (9, 2), (13, 3)])
def test_the_last_chunk_is_never_written(T, steps):
    """n chunks take n - 1 steps: the scan over chunks is that long."""
    p, _ = setup(BASE)
    x = jax.ShapeDtypeStruct((B, T, WIDTH), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda p, x: lact.forward(p, x, BASE)[0])(p, x)
    W = (B, 2, 8, 8)  # what a scan over chunks carries
    lengths = [
        eqn.params["length"]
        for eqn in jaxpr.jaxpr.eqns
        if eqn.primitive.name == "scan" and eqn.outvars[0].aval.shape == W
    ]
    assert lengths == ([steps] if steps else [])


def test_a_token_passes_through_the_window_then_the_weights():
    """What token 5 moves with the fast branch off is its window, and all after with."""
    p, x = setup(BASE)
    forward = functions(BASE)[0]
    change = x.at[:, 5].add(1.0)

    def moved(p):
        return np.any(forward(p, x)[0] != forward(p, change)[0], axis=(0, 2))

    t = np.arange(13)
    off = p | {"norm": 0 * p["norm"]}
    np.testing.assert_array_equal(moved(off), (t >= 5) & (t < 5 + C))
    np.testing.assert_array_equal(moved(p), t >= 5)


# Decoding


@pytest.mark.parametrize("name", ["muon", "pre_wide"])
@pytest.mark.parametrize("prefix", [3, 4, 5, 9])
def test_decoding_from_any_prefix(name, prefix):
    cfg = CONFIGS[name]
    p, x = setup(cfg)
    forward, one = functions(cfg)
    whole, _ = forward(p, x)
    y, state = forward(p, x[:, :prefix], state=lact.init_state(cfg, B, 13))
    ys = [*jnp.moveaxis(y, 1, 0)]
    for t in range(prefix, 13):
        y, state = one(p, x[:, t], state=state)
        ys.append(y)
    np.testing.assert_allclose(jnp.stack(ys, 1), whole, rtol=1e-4, atol=1e-4)


def test_rows_may_be_in_different_places_of_their_chunks():
    """Prompts of 2 and 7 tokens, padded to 7, then six tokens each."""
    p, x = setup(BASE)
    forward, one = functions(BASE)
    lengths = (2, 7)
    ids = jnp.array([[-1] * (7 - n) + [0] * n for n in lengths])
    prompts = jnp.stack([jnp.pad(r[:n], ((7 - n, 0), (0, 0)), constant_values=3.0)
                         for r, n in zip(x, lengths, strict=True)])  # fmt: skip
    _, state = forward(p, prompts, segment_ids=ids, state=lact.init_state(BASE, B, 13))
    np.testing.assert_array_equal(state.fast.filled, [2, 3])
    whole, _ = forward(p, x)
    for i in range(6):
        token = jnp.stack([x[row, n + i] for row, n in enumerate(lengths)])
        y, state = one(p, token, state=state)
        expected = jnp.stack([whole[row, n + i] for row, n in enumerate(lengths)])
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_many_documents_shorter_and_longer_than_a_chunk():
    """Borders anywhere, padding on both sides; every document as if alone."""
    p, x = setup(BASE)
    forward = functions(BASE)[0]
    rows = [
        [-1] + [0] * 1 + [1] * 2 + [2] * 9,
        [3] * 5 + [4] * 4 + [9] * 3 + [-1],
    ]
    y, _ = forward(p, x, segment_ids=jnp.array(rows))
    for row, ids in enumerate(np.array(rows)):
        for i in set(ids) - {-1}:
            own = np.flatnonzero(ids == i)
            alone = oracle(BASE, p, x[row, own])
            np.testing.assert_allclose(y[row, own], alone, rtol=2e-4, atol=2e-4)


# Gradients and errors


@pytest.mark.parametrize("name", ["muon", "gradient_descent"])
def test_gradients_are_finite_with_rows_of_zeros(name):
    """Zero tokens, a zero chunk, and parameters of which half the columns are zero."""
    cfg = CONFIGS[name]
    p, x = setup(cfg)
    p = {n: w.at[..., ::2].set(0) if n.startswith("fast") else w for n, w in p.items()}
    p |= {n: 0 * p[n] for n in ("q_offset", "k_offset")}
    x = x.at[:, 2].set(0).at[0, 4:8].set(0)

    def loss(p, x):
        return jnp.sum(lact.forward(p, x, cfg)[0] ** 2)

    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(p, x)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("order", ["update_apply", "update_all"])
def test_orders_that_are_not_causal_cannot_decode(order):
    cfg = dataclasses.replace(BASE, order=order)
    p, x = setup(cfg)
    state = lact.init_state(cfg, B, 13)
    y, _ = functions(cfg)[0](p, x)
    assert np.all(np.isfinite(y)) and np.any(y != functions(BASE)[0](p, x)[0])
    with pytest.raises(ValueError, match=f"order='{order}'.*cannot be decoded"):
        lact.step(p, x[:, 0], cfg, state)
    with pytest.raises(ValueError, match=f"order='{order}' works on whole rows"):
        lact.forward(p, x, cfg, state=state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 3}, "window=3 is smaller than chunk_size=4"),
        ({"n_fast_heads": 3}, "width=16 is not divisible by n_fast_heads=3"),
        ({"n_heads": 5}, "width=16 is not divisible by n_heads=5"),
        ({"n_heads": 16}, "width=16 / n_heads=16 is an odd head size"),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"order": "strided"}, "'strided' needs to know which tokens write"),
        ({"order": "both"}, "order='both' is not one of"),
        ({"optimizer": "adam"}, "optimizer='adam' is not one of"),
        ({"scale_placement": "both"}, "scale_placement='both' is not one of"),
        ({"base_lr": 0.0}, "base_lr=0.0 must be above 0"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 2, "window": C}, r"fast.k of shape \(2, 2, 2, 8\)"),
        ({"inter_multi": 2}, r"fast.change.gate of shape \(2, 2, 8, 16\)"),
        ({"momentum": False}, "fast.*of shape None"),
    ],
)
def test_a_state_of_another_config(change, message):
    p, x = setup(BASE)
    state = lact.init_state(dataclasses.replace(BASE, **change), B, 13)
    with pytest.raises(ValueError, match=f"The state has {message}.*another Config"):
        lact.step(p, x[:, 0], BASE, state)


def test_a_state_of_another_batch():
    p, x = setup(BASE)
    with pytest.raises(
        ValueError, match=r"cache.k of shape \(3, .*init_state\(cfg, 2, max_length\)"
    ):
        lact.forward(p, x, BASE, state=lact.init_state(BASE, 3, 13))


def test_strided_and_its_tokens_belong_together():
    W = FastWeights(*(jnp.ones((1, 2, 2)),) * 3)
    x = jnp.ones((1, 3, 1, 2))
    args = W, x, x, x, jnp.ones((1, 3, 1, 3))
    with pytest.raises(ValueError, match="order 'strided' needs the tokens that write"):
        ttt_scan(*args, chunk_size=2, order="strided")
    with pytest.raises(ValueError, match="no other takes them"):
        ttt_scan(*args, chunk_size=2, writes=jnp.ones((1, 3), bool))
