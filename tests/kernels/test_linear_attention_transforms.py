"""Gated linear attention under JAX's transformations, in other types, and sharded."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from recurrence_law import error

from benchmarks.cases import linear_attention as cases
from pallas_kernels import gated_linear_attention

SMALL = cases.SHAPES["small"]
FORMS = ("xla", "reference")


def operands(decay="channel", name="mixed_decay", **shape):
    inputs = cases.draw(name, SMALL._replace(**shape), decay)
    return [jnp.asarray(inputs[n]) for n in ("q", "k", "v", "g", "d_o")]


def gradients(f, *x):
    """o, and its gradients for q, k, v and g given that for o, the last operand."""
    *x, d_o = x
    o, pullback = jax.vjp(lambda *x: f(*x)[0], *x)
    return o, *pullback(d_o)


def assert_close(got, want):
    for a, b in zip(got, want, strict=True):
        assert error(np.asarray(a), np.asarray(b)) < 2e-6


@pytest.mark.parametrize("decay", cases.DECAYS)
def test_vmap_and_scan_and_remat_change_nothing(decay):
    x = operands(decay, B=3)
    f = gated_linear_attention
    want = jax.jit(partial(gradients, f))(*x)
    by_row = [jnp.expand_dims(a, 1) for a in x]

    @jax.jit
    def mapped(*x):
        return [a[:, 0] for a in jax.vmap(partial(gradients, f))(*x)]

    @jax.jit
    def scanned(*x):
        def body(_, row):
            return None, gradients(jax.checkpoint(f), *row)

        return [a[:, 0] for a in jax.lax.scan(body, None, x)[1]]

    assert_close(mapped(*by_row), want)
    assert_close(scanned(*by_row), want)


@pytest.mark.parametrize("how", ("gspmd", "shard_map"))
@pytest.mark.parametrize("decay", cases.DECAYS)
def test_sharded_over_batch_and_heads(how, decay):
    x = operands(decay, B=4, H=4, T=70)
    f = partial(gradients, gated_linear_attention)
    want = jax.jit(f)(*x)

    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    spec = P("data", None, "tensor")
    place = NamedSharding(mesh, spec)
    if how == "shard_map":
        f = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)
    f = jax.jit(f, in_shardings=place)
    sharded = [jax.device_put(a, place) for a in x]
    got = f(*sharded)
    for a in got:
        assert a.sharding.is_equivalent_to(place, a.ndim)
    assert_close(got, want)
    # Rows and heads are independent: nothing crosses between devices.
    program = f.lower(*sharded).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in program


@pytest.mark.parametrize("T", (7, 150))
@pytest.mark.parametrize("divided", range(4))
def test_one_divided_operand_divides_the_results(divided, T):
    """In a `shard_map`, where the others are whole, and in a loop there."""
    x = operands("head", B=1, H=2, T=T)[:4]
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
    sizes = [1] * 4
    sizes[divided] = 2

    def loss(*x):
        def body(state, _):
            o, state = gated_linear_attention(*x, initial_state=state)
            return state, o

        _, state = gated_linear_attention(*x)
        state, o = jax.lax.scan(body, state, length=2)
        return jnp.sum(state**2) + jnp.sum(o**2)

    def both(*x):
        value, grads = jax.value_and_grad(loss, argnums=divided)(*x)
        return value[None], grads

    stacked = [jnp.concatenate([a] * n) for a, n in zip(x, sizes, strict=True)]
    specs = tuple(P("rows") if n == 2 else P() for n in sizes)
    f = jax.shard_map(both, mesh=mesh, in_specs=specs, out_specs=P("rows"))
    values, grads = jax.jit(f)(*stacked)
    value, grad = jax.jit(both)(*x)
    np.testing.assert_allclose(values, jnp.concatenate([value] * 2), rtol=1e-5)
    np.testing.assert_allclose(grads, jnp.concatenate([grad] * 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", FORMS)
def test_dtypes_of_results(implementation):
    f = partial(gated_linear_attention, implementation=implementation)
    for dtype in (jnp.float32, jnp.bfloat16):
        x, g = jnp.ones((1, 3, 1, 4), dtype), -jnp.ones((1, 3, 1))
        o, state = f(x, x, x, g)
        assert o.dtype == dtype and state.dtype == jnp.float32
        d = jax.grad(lambda x, f=f, g=g: f(x, x, x, g)[0].sum().astype(float))(x)
        assert d.dtype == dtype
    o, state = f(jnp.ones((1, 3, 1, 4)), x, x.astype(jnp.float32), g)
    assert o.dtype == jnp.float32  # v's, whatever the others are


@pytest.mark.parametrize("implementation", FORMS)
def test_scale(implementation):
    q, k, v, g, _ = operands()
    f = partial(gated_linear_attention, implementation=implementation)
    o, state = f(q, k, v, g)
    scaled, same = f(q, k, v, g, scale=3.0)
    np.testing.assert_allclose(scaled, 3.0 * q.shape[-1] ** 0.5 * o, rtol=1e-5)
    np.testing.assert_array_equal(same, state)


@pytest.mark.parametrize("precision", ("default", "high", jax.lax.Precision.HIGHEST))
def test_precision_is_accepted(precision):
    q, k, v, g, _ = operands()
    o, _ = gated_linear_attention(q, k, v, g, precision=precision)
    want, _ = gated_linear_attention(q, k, v, g, implementation="reference")
    assert error(o, want) < 1e-5


@pytest.mark.parametrize("decay", cases.DECAYS)
def test_infinite_decay_forgets(decay):
    """g = -inf is a reset, with finite gradients."""
    q, k, v, g, d_o = operands(decay, "gate", T=40)
    g = g.at[:, 20].set(-jnp.inf)
    f = partial(gated_linear_attention, implementation="xla")
    o, _ = f(q, k, v, g)
    later = [x[:, 20:] for x in (q, k, v, g.at[:, 20].set(0.0))]
    np.testing.assert_allclose(o[:, 20:], f(*later)[0], atol=1e-5)
    _, *grads = gradients(f, q, k, v, g, d_o)
    assert all(jnp.isfinite(x).all() for x in grads)
    assert not grads[3][:, 20].any()
