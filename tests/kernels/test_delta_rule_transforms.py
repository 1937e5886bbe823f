"""The delta rule under JAX's transformations, in other types, and sharded."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from recurrence_law import error, run, small

from benchmarks.cases import delta_rule as cases
from pallas_kernels import delta_product, delta_rule

NAMES = ("q", "k", "v", "beta", "g")


def operands(name="twelve_keys_gated", **shape):
    inputs = cases.draw(name, small(**shape))
    return [jnp.asarray(inputs[n]) for n in NAMES] + [inputs["d_o"]]


def gradients(f, *x):
    """o, and its gradients for q, k, v, beta and g given that for o, the last."""
    *x, d_o = x
    o, pullback = jax.vjp(lambda *x: f(*x)[0], *x)
    return o, *pullback(d_o)


def assert_close(got, want):
    for a, b in zip(got, want, strict=True):
        assert error(np.asarray(a), np.asarray(b)) < 2e-6


def test_vmap_and_scan_and_remat_change_nothing():
    x = operands(B=3, N=2)
    want = jax.jit(partial(gradients, delta_product))(*x)
    by_row = [jnp.expand_dims(a, 1) for a in x]

    @jax.jit
    def mapped(*x):
        return [a[:, 0] for a in jax.vmap(partial(gradients, delta_product))(*x)]

    @jax.jit
    def scanned(*x):
        def body(_, row):
            return None, gradients(jax.checkpoint(delta_product), *row)

        return [a[:, 0] for a in jax.lax.scan(body, None, tuple(x))[1]]

    assert_close(mapped(*by_row), want)
    assert_close(scanned(*by_row), want)


@pytest.mark.parametrize("how", ("gspmd", "shard_map"))
@pytest.mark.parametrize("implementation", ("xla", "reference"))
def test_sharded_over_batch_and_heads(how, implementation):
    x = operands(B=4, H=4, N=2, T=70)
    f = partial(gradients, partial(delta_product, implementation=implementation))
    want = jax.jit(f)(*x)

    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    token, key = P("data", None, "tensor"), P("data", None, None, "tensor")
    specs = (token, key, key, key, token, token)
    if how == "shard_map":
        f = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=(token, *specs[:5]))
    places = [NamedSharding(mesh, spec) for spec in specs]
    f = jax.jit(f, in_shardings=places)
    sharded = [jax.device_put(a, place) for a, place in zip(x, places, strict=True)]
    got = f(*sharded)
    for a, place in zip(got, (places[0], *places[:5]), strict=True):
        assert a.sharding.is_equivalent_to(place, a.ndim)
    assert_close(got, want)
    # Rows and heads are independent: nothing passes between devices.
    program = f.lower(*sharded).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in program


@pytest.mark.parametrize("name", ("random", "silu_keys_gated", "twelve_keys_gated"))
def test_bfloat16_is_within_its_rounding(name):
    inputs = cases.draw(name, small(N=2))
    for n in ("q", "k", "v"):
        inputs[n] = inputs[n].astype(jnp.bfloat16)
    exact = {
        n: x.astype(np.float32) if x is not None else None for n, x in inputs.items()
    }
    got, want = run(inputs, "xla"), run(exact, "reference")
    for n in want:
        assert error(got[n], want[n]) < 4 * float(jnp.finfo(jnp.bfloat16).eps), n


@pytest.mark.parametrize("implementation", ("xla", "reference"))
def test_dtypes_of_results(implementation):
    f = partial(delta_rule, implementation=implementation)
    for dtype in (jnp.float32, jnp.bfloat16):
        x, beta = jnp.ones((1, 3, 1, 4), dtype), jnp.ones((1, 3, 1))
        o, state = f(x, x, x, beta)
        assert o.dtype == dtype and state.dtype == jnp.float32
        d = jax.grad(lambda x, f=f, b=beta: f(x, x, x, b)[0].sum().astype(float))(x)
        assert d.dtype == dtype
    o, state = f(jnp.ones((1, 3, 1, 4)), x, x.astype(jnp.float32), beta)
    assert o.dtype == jnp.float32  # v's, whatever the others are


@pytest.mark.parametrize("implementation", ("xla", "reference"))
def test_scale(implementation):
    q, k, v, beta, g, _ = operands()
    f = partial(delta_product, implementation=implementation)
    o, state = f(q, k, v, beta, g)
    scaled, same = f(q, k, v, beta, g, scale=3.0)
    np.testing.assert_allclose(scaled, 3.0 * q.shape[-1] ** 0.5 * o, rtol=1e-5)
    np.testing.assert_array_equal(same, state)


@pytest.mark.parametrize("precision", ("default", "high", jax.lax.Precision.HIGHEST))
def test_precision_is_accepted(precision):
    q, k, v, beta, g, _ = operands()
    o, _ = delta_product(q, k, v, beta, g, precision=precision)
    want, _ = delta_product(q, k, v, beta, g, implementation="reference")
    assert error(o, want) < 1e-5


def test_infinite_decay_forgets():
    """g = -inf is a reset, with finite gradients."""
    q, k, v, beta, g, d_o = operands(T=40)
    g = g.at[:, 20].set(-jnp.inf)
    f = partial(delta_product, implementation="xla")
    o, _ = f(q, k, v, beta, g)
    later = [x[:, 20:] for x in (q, k, v, beta, g.at[:, 20].set(0.0))]
    np.testing.assert_allclose(o[:, 20:], f(*later)[0], atol=1e-5)
    assert all(jnp.isfinite(x).all() for x in gradients(f, q, k, v, beta, g, d_o))
