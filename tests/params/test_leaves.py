"""Every leaf behaves as the dense matrix it stands for, under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from jaxlab import params
from jaxlab.params import (
    LowRank,
    Quantized,
    Tapped,
    embed,
    linear,
    linear_t,
    sketch_taps,
    value,
)

IN, OUT, RANK = 6, 4, 2


def dense(key):
    return jax.random.normal(key, (IN, OUT))


def low_rank(key, base=dense):
    kw, ka, kb = jax.random.split(key, 3)
    a = jax.random.normal(ka, (IN, RANK))
    return LowRank(base(kw), a, jax.random.normal(kb, (OUT, RANK)))


def scaled(key):
    return low_rank(key).replace(scale=jnp.float32(-0.3))


LEAVES = {
    "dense": dense,
    "low_rank": low_rank,
    "scaled_low_rank": scaled,
    "quantized": lambda key: params.quantize(dense(key)),
    "tapped": lambda key: params.tapped(dense(key)),
    "low_rank_of_quantized": lambda key: low_rank(
        key, lambda k: params.quantize(dense(k))
    ),
    "tapped_low_rank": lambda key: params.tapped(low_rank(key)),
}


@pytest.fixture(params=LEAVES, ids=str)
def weight(request, key):
    return LEAVES[request.param](key)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


def test_products_equal_the_dense_matrix(weight, key):
    w = np.asarray(value(weight), np.float64)
    x = jax.random.normal(key, (2, 3, IN))
    y = jax.random.normal(key, (2, 3, OUT))
    ids = jnp.array([[0, 5, 5], [2, 1, 0]])
    close(jax.jit(linear)(x, weight), np.asarray(x) @ w)
    close(jax.jit(linear_t)(y, weight), np.asarray(y) @ w.T)
    close(jax.jit(embed)(weight, ids), w[np.asarray(ids)])


def test_products_keep_the_activation_dtype(weight, key):
    x = jax.random.normal(key, (3, IN), jnp.bfloat16)
    y = jax.random.normal(key, (3, OUT), jnp.bfloat16)
    assert linear(x, weight).dtype == jnp.bfloat16
    assert linear_t(y, weight).dtype == jnp.bfloat16
    assert embed(weight, jnp.array([1, 2]), jnp.bfloat16).dtype == jnp.bfloat16


def test_gradient_reaches_the_input_as_if_dense(weight, key):
    w = value(weight)
    x = jax.random.normal(key, (3, IN))
    loss = lambda x, w: jnp.sum(jnp.sin(linear(x, w)))  # noqa: E731
    close(jax.grad(loss)(x, weight), jax.grad(loss)(x, w))


def test_scan_vmap_and_remat_see_stacked_layers(weight, key):
    square = {
        "w": jax.vmap(lambda k: weight_square(weight, k))(jax.random.split(key, 3))
    }
    x = jax.random.normal(key, (5, IN))

    @jax.checkpoint
    def layer(x, p):
        return jnp.tanh(linear(x, p["w"])), None

    scanned, _ = jax.jit(lambda x, p: jax.lax.scan(layer, x, p))(x, square)
    looped = x
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], square)
        looped = jnp.tanh(looped @ value(one["w"]))
    close(scanned, looped)
    batched = jax.vmap(lambda p: linear(x, p["w"]))(square)
    close(batched[1], x @ value(jax.tree.map(lambda leaf: leaf[1], square)["w"]))


def weight_square(weight, key):
    """A square leaf of the same kind, so that layers chain."""
    match weight:
        case Tapped():
            return params.tapped(weight_square(weight.w, key))
        case LowRank():
            ka, kb, kw = jax.random.split(key, 3)
            return LowRank(
                weight_square(weight.w, kw),
                jax.random.normal(ka, (IN, RANK)),
                jax.random.normal(kb, (IN, RANK)),
                weight.scale,
            )
        case Quantized():
            return params.quantize(jax.random.normal(key, (IN, IN)))
        case _:
            return jax.random.normal(key, (IN, IN))


def test_population_shares_the_base_weight(key):
    """vmap over the factors alone: the base matrix product is not repeated."""
    base = dense(key)
    a = jax.random.normal(key, (7, IN, RANK))
    b = jax.random.normal(key, (7, OUT, RANK))
    x = jax.random.normal(key, (3, IN))
    member = jax.vmap(linear, in_axes=(None, LowRank(None, 0, 0)))
    y = member(x, LowRank(base, a, b))
    close(y, np.stack([x @ (base + a[i] @ b[i].T) for i in range(7)]))
    flops = lambda p: (  # noqa: E731
        jax.jit(member).lower(x, p).compile().cost_analysis()["flops"]
    )
    everyone = LowRank(jnp.broadcast_to(base, (7, IN, OUT)), a, b)
    apart = jax.jit(jax.vmap(linear, in_axes=(None, 0)))
    assert (
        flops(LowRank(base, a, b))
        < apart.lower(x, everyone).compile().cost_analysis()["flops"]
    )


def test_weights_may_share_factors_and_differ_in_scale(key):
    pair = scaled(key).replace(scale=jnp.array([0.5, -0.5]))
    x = jax.random.normal(key, (3, IN))
    y = jax.vmap(linear, (None, LowRank(None, None, None, 0)))(x, pair)
    for n, scale in enumerate((0.5, -0.5)):
        close(y[n], x @ (pair.w + scale * pair.a @ pair.b.T))


def statistics(x, tapped_weight, product=linear):
    """Gradient and tap of a loss with known output gradient cos(y)."""

    def loss(w):
        return jnp.sum(jnp.sin(product(x, w)))

    return jax.grad(loss)(tapped_weight)


def test_tap_reports_sums_and_leaves_the_gradient_alone(key):
    w = dense(key)
    x = jax.random.normal(key, (2, 3, IN))
    grads = statistics(x, params.tapped(w))
    plain = statistics(x, w)
    np.testing.assert_array_equal(grads.w, plain)
    close(grads.tap.a, np.asarray(x).sum((0, 1)))
    close(grads.tap.g, np.cos(np.asarray(x) @ np.asarray(w)).sum((0, 1)))
    assert grads.tap.rows == 6


def test_tap_output_sum_is_the_bias_gradient(key):
    w, x = dense(key), jax.random.normal(key, (5, IN))
    bias = jnp.zeros(OUT)

    def loss(w, bias):
        return jnp.sum(jnp.sin(linear(x, w) + bias[None]) ** 2)

    grads, bias_grad = jax.grad(loss, argnums=(0, 1))(params.tapped(w), bias)
    close(grads.tap.g, bias_grad)


def test_tap_of_transposed_product_and_lookup(key):
    w = params.tapped(dense(key))
    y = jax.random.normal(key, (5, OUT))
    tap = statistics(y, w, linear_t).tap
    close(tap.g, np.asarray(y).sum(0))
    close(tap.a, np.cos(np.asarray(y) @ np.asarray(w.w).T).sum(0))
    ids = jnp.array([0, 5, 5])
    tap = statistics(ids, w, lambda ids, w: embed(w, ids)).tap
    close(tap.a, [1, 0, 0, 0, 0, 2])
    close(tap.g, np.cos(np.asarray(w.w)[[0, 5, 5]]).sum(0))


def test_tap_adds_over_scan_and_remat(key):
    """A weight used three times under remat is counted three times, not six."""
    w = params.tapped(jax.random.normal(key, (IN, IN)))
    x = jax.random.normal(key, (5, IN))

    def loss(w):
        body = jax.checkpoint(lambda x, _: (jnp.tanh(linear(x, w)), None))
        return jnp.sum(jax.lax.scan(body, x, length=3)[0])

    assert jax.grad(loss)(w).tap.rows == 15


def test_tap_is_the_same_on_a_mesh(key):
    w, x = params.tapped(dense(key)), jax.random.normal(key, (8, IN))
    mesh = params.make_mesh(params.MeshConfig(data=2, tensor=4))
    one = statistics(x, w)
    with jax.set_mesh(mesh):
        split = jax.sharding.NamedSharding
        x_s = jax.device_put(x, split(mesh, params.partition_spec(("batch", None))))
        columns = split(mesh, params.partition_spec((None, "heads")))
        w_s = Tapped(jax.device_put(w.w, columns), w.tap)
        many = jax.jit(statistics)(x_s, w_s)
    jax.tree.map(close, many, one)


def test_quantization_error_is_at_most_half_a_step(key):
    w = dense(key)
    q = params.quantize(w)
    assert np.all(np.abs(value(q) - w) <= 0.5001 * np.asarray(q.scale))
    np.testing.assert_array_equal(value(params.quantize(jnp.zeros((IN, OUT)))), 0.0)


@pytest.mark.parametrize(
    "convert",
    [jnp.asarray, np.asarray, lambda w: jnp.ones((2, IN)) @ w, jnp.sum],
    ids=["jnp.asarray", "np.asarray", "matmul", "jnp.sum"],
)
@pytest.mark.parametrize("kind", [name for name in LEAVES if name != "dense"])
def test_structured_leaves_refuse_to_become_arrays(kind, convert, key):
    with pytest.raises(TypeError, match="structured weight|unsupported operand"):
        convert(LEAVES[kind](key))


# A leaf of somebody's own -------------------------------------------------------------


@struct.dataclass
class Doubled(params.Leaf):
    """Twice a weight; it cannot be looked up."""

    w: jax.Array

    def linear(self, x):
        return 2 * params.linear(x, self.w)

    def value(self):
        return 2 * params.value(self.w)


def test_a_leaf_of_somebody_else_is_a_weight():
    x, w = jnp.ones((3, 4)), Doubled(jnp.ones((4, 2)))
    np.testing.assert_array_equal(params.linear(x, w), jnp.full((3, 2), 8.0))
    tapped = params.tapped(w)
    np.testing.assert_array_equal(params.linear(x, tapped), jnp.full((3, 2), 8.0))
    np.testing.assert_array_equal(params.value(tapped), jnp.full((4, 2), 2.0))
    nested = params.LowRank(w, jnp.ones((4, 1)), jnp.ones((2, 1)))
    np.testing.assert_array_equal(params.linear(x, nested), jnp.full((3, 2), 12.0))


@pytest.mark.parametrize(
    ("operation", "call"),
    (
        ("embed", lambda w: params.embed(w, jnp.zeros(2, jnp.int32))),
        ("linear_t", lambda w: params.linear_t(jnp.ones((3, 2)), w)),
        ("grouped_linear", lambda w: params.grouped_linear(jnp.ones((3, 4)), w, None)),
    ),
)
def test_a_missing_operation_is_named(operation, call):
    with pytest.raises(TypeError, match=f"Doubled has no operation '{operation}'"):
        call(Doubled(jnp.ones((4, 2))))


def test_sketched_taps_have_the_statistics_of_the_gradient_on_average():
    """Over many draws; a stack of two weights, and one that is not tapped."""
    rng = np.random.default_rng(0)
    G = jnp.asarray(rng.normal(size=(2, 6, 4)) * [[[3.0]], [[0.01]]], jnp.float32)
    tree, where = {"w": G, "b": jnp.ones(4)}, {"w": True, "b": False}

    def draw(key):
        return sketch_taps(tree, where, key)["w"]

    assert sketch_taps(tree, where, jax.random.key(0))["b"] is None
    taps = jax.vmap(draw)(jax.random.split(jax.random.key(1), 20_000))
    mean = np.einsum("nsi,nsj->sij", taps.g, taps.g) / 20_000
    want = np.einsum("sio,sip->sop", G, G) / 6
    size = np.abs(want).max(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(mean / size, want / size, atol=0.05)
    np.testing.assert_allclose(np.mean(taps.a**2, axis=-1), 1.0, rtol=1e-5)
    # A gradient of rank one gives its own vectors, whatever the signs.
    u, v = jnp.array([1.0, 2.0, 4.0]), jnp.array([1.0, -2.0])
    tap = sketch_taps({"w": jnp.outer(u, v)}, {"w": True}, jax.random.key(2))["w"]
    np.testing.assert_allclose(np.abs(tap.a), u / np.sqrt(7.0), rtol=1e-5)
    np.testing.assert_allclose(np.abs(tap.g / v), np.abs(tap.g[0]), rtol=1e-5)
    assert np.abs(tap.g[0]) > 0.5
    # Nothing is divided by the size of a gradient that is zero.
    tap = sketch_taps({"w": jnp.zeros((3, 2))}, {"w": True}, jax.random.key(2))["w"]
    assert not np.any(tap.a) and not np.any(tap.g)
