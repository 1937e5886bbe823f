"""Aaren against softmax attention with a constant query, in float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import params
from jaxlab.mixers import aaren

CFG = aaren.Config(16, n_heads=2)


def layer(p, x, ids, H):
    """Masked softmax over all pairs of one row: what the scan must equal."""
    p = {name: np.asarray(w, np.float64) for name, w in p.items()}
    x = np.asarray(x, np.float64)
    T, D = len(x), p["query"].shape[1]
    k, v = ((x @ p[name]).reshape(T, H, D) for name in ("w_k", "w_v"))
    scores = np.einsum("hd,shd->hs", p["query"], k) / np.sqrt(D)
    seen = np.tril(np.ones((T, T), bool)) & (ids[:, None] == ids[None])
    scores = np.where(seen, scores[:, None], -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hts,shd->thd", weights, v).reshape(T, -1) @ p["w_o"]


@functools.cache
def setup(T=33):
    key = jax.random.key(3)
    x = jax.random.normal(key, (2, T, 16))
    return params.init(aaren.spec(CFG), key), x


def scaled(p, scale):
    return p | {"query": scale * p["query"]}


@pytest.mark.parametrize("scale", (1.0, 0.0, 1e4))
def test_scan_is_softmax_attention_of_a_constant_query(scale):
    p, x = setup()
    p = scaled(p, scale)
    ids = np.repeat([4, 4, 9, 2], [10, 1, 20, 2])
    for segment_ids in (None, jnp.asarray(np.stack([ids, ids]), jnp.int32)):
        y, _ = aaren.forward(p, x, CFG, segment_ids=segment_ids)
        own = np.zeros(33) if segment_ids is None else ids
        for row in range(2):
            want = layer(p, x[row], own, 2)
            # Scores of 1e4 are known to a rounding of 1e-3, and so are the weights.
            tolerance = 2e-6 if scale < 1e4 else 5e-3
            np.testing.assert_allclose(y[row], want, rtol=tolerance, atol=tolerance)


def test_large_scores_have_finite_gradients():
    p, x = setup()

    def loss(p, x):
        return jnp.sum(aaren.forward(scaled(p, 1e4), x, CFG)[0] ** 2)

    for grad in jax.tree.leaves(jax.grad(loss, argnums=(0, 1))(p, x)):
        assert np.all(np.isfinite(grad)) and np.any(grad != 0)


def test_gradients_are_those_of_softmax_attention():
    """Although the largest score is taken for a constant."""
    p, x = setup()
    d_y = jax.random.normal(jax.random.key(8), x.shape)

    def softmax_attention(p, x):
        k, v = ((x @ p[name]).reshape(2, 33, 2, 8) for name in ("w_k", "w_v"))
        scores = jnp.einsum("hd,bshd->bhs", p["query"], k)[:, :, None] / jnp.sqrt(8.0)
        seen = jnp.tril(jnp.ones((33, 33), bool))[None, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        o = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(2, 33, 16)
        return jnp.sum(o @ p["w_o"] * d_y)

    def scan(p, x):
        return jnp.sum(aaren.forward(p, x, CFG)[0] * d_y)

    got = jax.grad(scan, argnums=(0, 1))(p, x)
    want = jax.grad(softmax_attention, argnums=(0, 1))(p, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def random_set(rng, scale):
    m = scale * rng.standard_normal((5, 3))
    u = rng.uniform(1, 4, (5, 3))
    w = rng.standard_normal((5, 3, 4))
    return aaren.AarenState(*(jnp.asarray(a, jnp.float32) for a in (m, u, w)))


@pytest.mark.parametrize("scale", (1.0, 1e4))
def test_combine_is_associative(scale):
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b, c = (random_set(rng, scale) for _ in range(3))
        left = aaren.combine(aaren.combine(a, b), c)
        right = aaren.combine(a, aaren.combine(b, c))
        np.testing.assert_array_equal(left.m, right.m)
        np.testing.assert_allclose(left.u, right.u, rtol=1e-6)
        np.testing.assert_allclose(left.w, right.w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", (1.0, 1e4, 1e30))
def test_the_empty_set_is_neutral(scale):
    empty = aaren.init_state(aaren.Config(12, 3), 5)
    a = random_set(np.random.default_rng(1), scale)
    for combined in (aaren.combine(a, empty), aaren.combine(empty, a)):
        jax.tree.map(np.testing.assert_array_equal, combined, a)
    nothing = aaren.combine(empty, empty)
    jax.tree.map(np.testing.assert_array_equal, nothing, empty)
    grads = jax.grad(lambda e: jnp.sum(aaren.combine(e, empty).w))(empty)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


def test_memory_is_linear_in_time():
    """Values and gradients: no array of T x T."""

    def temporaries(T):
        p, _ = setup()
        x = jnp.ones((1, T, 16))
        loss = jax.grad(lambda p, x: jnp.sum(aaren.forward(p, x, CFG)[0]))
        compiled = jax.jit(loss).lower(p, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(2048) < 2.5 * temporaries(1024) < 2.5 * 4 * 1024**2


def test_state_does_not_grow():
    p, x = setup()
    state = aaren.init_state(CFG, 2)
    shapes = jax.tree.map(jnp.shape, state)
    _, state = aaren.forward(p, x, CFG, state=state)
    _, state = aaren.step(p, x[:, 0], CFG, state)
    assert jax.tree.map(jnp.shape, state) == shapes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: aaren.Config(30), "width=30 .* n_heads=4"),
        (lambda: aaren.Config(16, n_heads=0), "n_heads=0 must be at least 1"),
        (lambda: aaren.Config(16, head_size=0), "head_size=0 must be"),
    ],
)
def test_bad_configs(make, message):
    with pytest.raises(ValueError, match=message):
        make()
