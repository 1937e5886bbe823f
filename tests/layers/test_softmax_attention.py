"""Attention in a sliding window: block by block equals one masked product."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.layers import init_cache, segments, softmax_attention
from jaxlab.layers.softmax_attention import attend

B, H, G, D = 2, 4, 2, 6


@functools.cache
def inputs(T):
    keys = jax.random.split(jax.random.key(5), 3)
    heads = (H, G, G)
    return [
        jax.random.normal(key, (B, T, n, D)) for key, n in zip(keys, heads, strict=True)
    ]


def rows(*rows):
    return segments.documents(jnp.array(rows, jnp.int32))


def masked(q, k, v, ids, window):
    t = np.arange(ids.shape[1])
    behind = t[:, None] - t[None, :]
    ids = np.asarray(ids)
    visible = ((behind >= 0) & (behind < window))[None]
    visible = visible & (ids[:, :, None] == ids[:, None, :]) & (ids[:, None] >= 0)
    o = attend(q, k, v, jnp.array(visible))
    return np.where((ids >= 0)[..., None, None], o, 0)


@functools.partial(jax.jit, static_argnames=("window", "block_size"))
def windowed(q, k, v, ids, window, block_size=None, cache=None):
    start = jnp.zeros((B,), jnp.int32) if cache is None else cache.length
    positions = segments.positions(ids, start)
    return softmax_attention(
        *(q, k, v, ids, positions),
        window=window,
        cache=cache,
        block_size=block_size,
    )


LAYOUTS = {
    "one": rows([0] * 23, [0] * 23),
    "packed": rows([0] * 9 + [1] * 2 + [2] * 12, [4] + [1] * 21 + [2]),
    "padded": rows([-1] * 5 + [0] * 15 + [-1] * 3, [0] * 3 + [1] * 11 + [-1] * 9),
    "nothing": rows([-1] * 23, [0] * 23),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("window", "block"), [(1, 4), (3, 5), (5, 5), (9, 4), (23, 8), (40, 7), (4, None)]
)
def test_blocks_equal_the_masked_product(window, block, layout):
    q, k, v = inputs(23)
    ids = LAYOUTS[layout]
    o, none = windowed(q, k, v, ids, window, block)
    assert none is None
    np.testing.assert_allclose(o, masked(q, k, v, ids, window), rtol=1e-5, atol=1e-5)


def test_default_blocks_of_a_long_row():
    T, window = 150, 10  # three blocks of 64
    ids = rows([0] * 70 + [1] * 80, [0] * T)
    q, k, v = inputs(T)
    o, _ = windowed(q, k, v, ids, window)
    np.testing.assert_allclose(o, masked(q, k, v, ids, window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [1, 4, 7])
@pytest.mark.parametrize("cuts", [(6, 14), (1, 2), (3, 20)])
def test_a_cache_continues_any_split(window, cuts):
    """Through blocks of 3; a row's pieces equal the whole, also behind padding."""
    q, k, v = inputs(23)
    ids = LAYOUTS["one"]
    whole = masked(q, k, v, ids, window)
    cache = init_cache(B, window, G, D)
    for lo, hi in zip((0, *cuts), (*cuts, 23), strict=True):
        part = [
            jnp.pad(x[:, lo:hi], ((0, 0), (2, 1), (0, 0), (0, 0)), constant_values=9)
            for x in (q, k, v)
        ]
        padded = jnp.pad(ids[:, lo:hi], ((0, 0), (2, 1)), constant_values=-1)
        o, cache = windowed(*part, padded, window, 3, cache)
        np.testing.assert_allclose(o[:, 2:-1], whole[:, lo:hi], rtol=1e-5, atol=1e-5)
    assert cache is not None and np.all(cache.length == 23)


def test_the_cache_belongs_to_the_first_document():
    q, k, v = inputs(23)
    _, cache = windowed(q, k, v, LAYOUTS["one"], 4, None, init_cache(B, 4, G, D))
    alone, _ = windowed(q, k, v, LAYOUTS["packed"], 4, 5)
    o, _ = windowed(q, k, v, LAYOUTS["packed"], 4, 5, cache)
    first = np.asarray(LAYOUTS["packed"]) == 1  # documents are counted from 1
    reached = first & (np.arange(23)[None] < 3)
    same = np.all(np.asarray(o) == np.asarray(alone), axis=(2, 3))
    np.testing.assert_array_equal(same, ~reached)


def test_gradients_equal_the_masked_product():
    q, k, v = inputs(23)
    ids = LAYOUTS["packed"]
    loss = lambda f: lambda *qkv: jnp.sum(jnp.sin(f(*qkv)))  # noqa: E731
    t = np.arange(23)
    behind = t[:, None] - t[None, :]
    visible = ((behind >= 0) & (behind < 5))[None] & (
        np.asarray(ids)[:, :, None] == np.asarray(ids)[:, None, :]
    )
    expected = jax.grad(
        loss(lambda q, k, v: attend(q, k, v, jnp.array(visible))), (0, 1, 2)
    )(q, k, v)
    actual = jax.grad(loss(lambda q, k, v: windowed(q, k, v, ids, 5, 4)[0]), (0, 1, 2))(
        q, k, v
    )
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_no_array_grows_faster_than_the_length():
    """T x T scores would be four times as many at twice the length."""

    def largest(T):
        q = jax.ShapeDtypeStruct((B, T, H, D), jnp.float32)
        kv = jax.ShapeDtypeStruct((B, T, G, D), jnp.float32)
        ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
        f = jax.jit(lambda *args: windowed(*args, 64)[0])
        jaxpr = jax.make_jaxpr(f)(q, kv, kv, ids)
        sizes = [
            int(np.prod(var.aval.shape))
            for eqn in _all_equations(jaxpr.jaxpr)
            for var in eqn.outvars
        ]
        return max(sizes)

    assert largest(2048) <= 2 * largest(1024)


def _all_equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _all_equations(inner)
