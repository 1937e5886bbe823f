"""Products of groups of rows equal one dense product a group, for every leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import params
from jaxlab.params import LowRank, grouped, grouped_linear, value

M, IN, OUT, N = 3, 6, 4, 40
SIZES = {
    "even": (14, 13, 13),
    "empty_groups": (0, 40, 0),
    "rows_left_over": (5, 0, 17),
    "no_rows": (0, 0, 0),
}


def dense(key):
    return jax.random.normal(key, (M, IN, OUT))


def low_rank(key):
    kw, ka, kb = jax.random.split(key, 3)
    a, b = jax.random.normal(ka, (M, IN, 2)), jax.random.normal(kb, (M, OUT, 2))
    return LowRank(dense(kw), a, b)


LEAVES = {
    "dense": dense,
    "low_rank": low_rank,
    "scaled_low_rank": lambda key: low_rank(key).replace(
        scale=jnp.array([0.5, 1.0, -2.0])
    ),
    "quantized": lambda key: params.quantize(dense(key)),
    "tapped_low_rank": lambda key: params.tapped(low_rank(key)),
}


@pytest.fixture(params=[8, 256], ids="rows_of_a_block_{}".format)
def block_rows(request, monkeypatch):
    """Several blocks a group, and one."""
    monkeypatch.setattr(grouped, "ROWS", request.param)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


def by_group(x, w, sizes):
    """One product after the other, in float64."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    y, start = np.zeros((len(x), w.shape[-1])), 0
    for m, size in enumerate(sizes):
        y[start : start + size] = x[start : start + size] @ w[m]
        start += size
    return y


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_product_and_gradients(sizes, block_rows, key):
    kx, kw, kc = jax.random.split(key, 3)
    x, w = jax.random.normal(kx, (N, IN)), dense(kw)
    c = jax.random.normal(kc, (N, OUT))
    run = jax.jit(lambda x, w, s: jax.vjp(lambda x, w: grouped_linear(x, w, s), x, w))
    y, pullback = run(x, w, jnp.array(sizes, jnp.int32))
    close(y, by_group(x, w, sizes))
    dx, dw = pullback(c)
    close(dx, by_group(c, np.swapaxes(w, 1, 2), sizes))
    start = 0
    for m, size in enumerate(sizes):
        rows = slice(start, start + size)
        close(dw[m], np.asarray(x)[rows].T @ np.asarray(c)[rows])
        start += size


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_leaf(leaf, key):
    w, x = LEAVES[leaf](key), jax.random.normal(key, (N, IN))
    sizes = jnp.array((5, 0, 17), jnp.int32)
    run = jax.jit(grouped_linear)
    close(run(x, w, sizes), by_group(x, value(w), sizes))
    assert run(x.astype(jnp.bfloat16), w, sizes).dtype == jnp.bfloat16


def test_tap_reports_sums_of_each_group(key):
    w, x = dense(key), jax.random.normal(key, (N, IN))
    sizes = jnp.array((5, 0, 17), jnp.int32)
    loss = lambda w: jnp.sum(jnp.sin(grouped_linear(x, w, sizes)))  # noqa: E731
    grads = jax.jit(jax.grad(loss))(params.tapped(w))
    close(grads.w, jax.grad(loss)(w))
    np.testing.assert_array_equal(grads.tap.rows, sizes)
    dy = np.cos(by_group(x, w, sizes))
    for m, rows in enumerate((slice(0, 5), slice(0, 0), slice(5, 22))):
        close(grads.tap.a[m], np.asarray(x)[rows].sum(0))
        close(grads.tap.g[m], dy[rows].sum(0))


def test_vmap_over_a_population_and_scan_over_layers(key):
    base = low_rank(key)
    x, sizes = jax.random.normal(key, (N, IN)), jnp.array((14, 13, 13), jnp.int32)
    signs = jnp.array([-1.0, 0.0, 1.0])
    member = lambda s: grouped_linear(  # noqa: E731
        x, LowRank(base.w, base.a * s, base.b), sizes
    )
    population = jax.jit(jax.vmap(member))(signs)
    layers = jax.tree.map(lambda a: jnp.stack([a, a]), base)
    body = lambda _, w: (None, grouped_linear(x, w, sizes))  # noqa: E731
    scanned = jax.jit(lambda w: jax.lax.scan(body, None, w)[1])(layers)
    for i, sign in enumerate(signs):
        w = base.w + sign * base.a @ base.b.mT
        close(population[i], by_group(x, w, (14, 13, 13)))
    close(scanned[1], by_group(x, value(base), (14, 13, 13)))


def test_ragged_dot_has_the_same_contract(key):
    """What TPUs and GPUs run, also for the rows left over."""
    x, w, sizes = jax.random.normal(key, (N, IN)), dense(key), (5, 0, 17)
    group_sizes = jnp.array(sizes, jnp.int32)
    y = jax.lax.ragged_dot(x, w, group_sizes)
    close(y, by_group(x, w, sizes))
    close(
        grouped._outer_ragged(x, y, group_sizes),
        grouped._outer_blocks(x, y, group_sizes),
    )
