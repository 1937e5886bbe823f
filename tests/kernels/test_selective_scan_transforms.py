"""The selective scan under JAX's transformations, in other types, and sharded."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from recurrence_law import error
from selective_scan_law import run, small

from benchmarks.cases import selective_scan as cases
from pallas_kernels import selective_scan

NAMES = ("x", "dt", "A", "B", "C", "D")


def operands(**shape):
    inputs = cases.draw("random", small(**shape))
    return [jnp.asarray(inputs[n]) for n in (*NAMES, "d_y")]


def gradients(f, *operands):
    """Value and gradients of sum(f(x, dt, A, B, C, D) * d_y)."""
    *operands, d_y = operands

    def loss(*operands):
        return jnp.sum(f(*operands)[0] * d_y)

    return jax.value_and_grad(loss, argnums=range(6))(*operands)


def assert_close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert error(np.asarray(a), np.asarray(b)) < 2e-6


def test_vmap_and_scan_and_remat_change_nothing():
    operands_ = operands(B=3)
    want = jax.jit(partial(gradients, selective_scan))(*operands_)
    weights = (2, 5)  # A and D are the same for every row
    by_row = [a if i in weights else a[:, None] for i, a in enumerate(operands_)]
    axes = [None if i in weights else 0 for i in range(7)]

    def whole(losses, grads):
        joined = [a.sum(0) if i in weights else a[:, 0] for i, a in enumerate(grads)]
        return losses.sum(), joined

    @jax.jit
    def mapped(*operands):
        return whole(*jax.vmap(partial(gradients, selective_scan), axes)(*operands))

    @jax.jit
    def scanned(*operands):
        def body(_, row):
            x, dt, B, C, d_y = row
            row = (x, dt, operands[2], B, C, operands[5], d_y)
            return None, gradients(jax.checkpoint(selective_scan), *row)

        rows = tuple(a for i, a in enumerate(operands) if i not in weights)
        return whole(*jax.lax.scan(body, None, rows)[1])

    assert_close(mapped(*by_row), want)
    assert_close(scanned(*by_row), want)


@pytest.mark.parametrize("how", ("gspmd", "shard_map"))
@pytest.mark.parametrize("implementation", ("xla", "reference"))
def test_sharded_over_batch_and_channels(how, implementation):
    operands_ = operands(B=4, T=70)
    f = partial(gradients, partial(selective_scan, implementation=implementation))
    want = jax.jit(f)(*operands_)

    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    token, state = P("data", None, "tensor"), P("data")
    specs = (token, token, P("tensor"), state, state, P("tensor"), token)
    if how == "shard_map":

        def by_shard(*operands):
            loss, grads = f(*operands)
            return jax.lax.psum(loss, ("data", "tensor")), grads

        g = jax.shard_map(
            by_shard, mesh=mesh, in_specs=specs, out_specs=(P(), specs[:6])
        )
    else:
        g = f
    places = [NamedSharding(mesh, spec) for spec in specs]
    g = jax.jit(g, in_shardings=places)
    sharded = [jax.device_put(a, p) for a, p in zip(operands_, places, strict=True)]
    assert_close(g(*sharded), want)
    # Rows and channels are independent: sums across devices are all there is.
    program = g.lower(*sharded).compile().as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in program


def test_bfloat16_is_within_its_rounding():
    inputs = cases.draw("random", small())
    for n in ("x", "dt", "B", "C", "d_y"):
        inputs[n] = inputs[n].astype(jnp.bfloat16)
    exact = {n: a.astype(np.float32) for n, a in inputs.items()}
    got, want = run(inputs, "xla"), run(exact, "reference")
    for n in want:  # results are rounded once
        assert error(got[n], want[n]) < float(jnp.finfo(jnp.bfloat16).eps), n
    for n in ("state", "d_A", "d_initial_state"):  # these stay float32
        assert error(got[n], want[n]) < 2e-6, n


@pytest.mark.parametrize("implementation", ("xla", "reference"))
def test_dtypes_of_results(implementation):
    f = partial(selective_scan, implementation=implementation)
    A = -jnp.ones((4, 2))
    for dtype in (jnp.float32, jnp.bfloat16):
        x, dt = jnp.ones((1, 3, 4), dtype), jnp.ones((1, 3, 4))
        B = jnp.ones((1, 3, 2), dtype)
        y, state = f(x, dt, A, B, B)
        assert y.dtype == dtype and state.dtype == jnp.float32

        def loss(x, B, f=f, dt=dt):
            return f(x, dt, A, B, B)[0].sum().astype(jnp.float32)

        d_x, d_B = jax.grad(loss, argnums=(0, 1))(x, B)
        assert d_x.dtype == d_B.dtype == dtype
    y, state = f(x.astype(jnp.float32), dt, A, B, B)
    assert y.dtype == jnp.float32  # x's, whatever the others are


def test_without_d_nothing_passes_by():
    x, dt, A, B, C, D, _ = operands()
    with_d, state = selective_scan(x, dt, A, B, C, D)
    without, same = selective_scan(x, dt, A, B, C)
    np.testing.assert_allclose(with_d - D[None, None] * x, without, atol=1e-5)
    np.testing.assert_array_equal(state, same)


def test_backward_keeps_no_state_of_every_token():
    """Of T = 2048 tokens, no array holds T states; "reference" does."""
    shapes = small(B=1, T=2048, E=64, N=16)
    operands_ = operands(B=1, T=2048, E=64, N=16)

    def temporaries(implementation):
        f = partial(gradients, partial(selective_scan, implementation=implementation))
        return jax.jit(f).lower(*operands_).compile().memory_analysis()

    every_state = 4 * shapes.T * shapes.E * shapes.N
    assert temporaries("xla").temp_size_in_bytes < every_state
    assert temporaries("reference").temp_size_in_bytes > 2 * every_state
