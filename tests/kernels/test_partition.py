"""A kernel's arguments on each device of a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import partition

AXES = ("data", "fsdp", "tensor")


def mesh_of(kind, *sizes):
    return jax.make_mesh(sizes, AXES[: len(sizes)], axis_types=(kind,) * len(sizes))


def shapes_seen(mesh, *shapes):
    """What a kernel of [B, T, H] and an optional [B, H] is called with."""
    seen = []

    def kernel(x, y):
        seen.append((x.shape, None if y is None else y.shape))
        return (2 * x,)

    run = partition.divided(kernel, ("BTH", "BH"), ("BTH",))
    x, *y = (jnp.arange(np.prod(s), dtype=jnp.float32).reshape(s) for s in shapes)
    with jax.set_mesh(mesh):
        (got,) = jax.jit(lambda x, y: run(x, y))(x, y[0] if y else None)
    np.testing.assert_array_equal(got, 2 * np.asarray(x))
    return seen[-1]


@pytest.mark.parametrize(
    "kind", (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit)
)
def test_rows_and_heads_are_divided(kind):
    mesh = mesh_of(kind, 2, 2, 2)
    assert shapes_seen(mesh, (4, 5, 6), (4, 6)) == ((1, 5, 3), (1, 3))
    assert shapes_seen(mesh, (2, 5, 6)) == ((1, 5, 3), None)


def test_what_an_axis_does_not_divide_stays_whole():
    mesh = mesh_of(jax.sharding.AxisType.Auto, 2, 2, 2)
    assert shapes_seen(mesh, (3, 5, 6)) == ((3, 5, 3), None)
    assert shapes_seen(mesh, (6, 5, 3)) == ((3, 5, 3), None)
    three = mesh_of(jax.sharding.AxisType.Auto, 3, 2)
    assert shapes_seen(three, (4, 5, 6)) == ((2, 5, 6), None)
    with jax.set_mesh(mesh):
        assert partition.part("H", 6) == 3
        assert partition.part("H", 3) == 3


def test_one_device_and_no_mesh():
    def kernel(x):
        return (x.shape,)

    run = partition.divided(kernel, ("BH",), ("BH",))
    assert run(jnp.ones((4, 6))) == ((4, 6),)
    with jax.set_mesh(mesh_of(jax.sharding.AxisType.Auto, 1)):
        assert run(jnp.ones((4, 6))) == ((4, 6),)
        assert partition.part("B", 4) == 4
