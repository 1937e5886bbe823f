"""Small states, their checkpoints, and damage to them: what these tests share."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab.checkpoint import Checkpoints

CONFIG = {"model": {"width": 8, "remat": False}, "learning_rate": 1e-3}


def mesh(*shape):
    names = ("data", "tensor")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


def put(x, mesh, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def small_state(seed):
    """Two arrays and a PRNG key; the values tell the seed."""
    values = np.random.default_rng(seed).normal(size=(16, 8)).astype(np.float32)
    m = mesh(4, 2)
    return {
        "params": {"w": put(values, m, "data", "tensor")},
        "step": put(jnp.int32(seed), m),
        "key": put(jax.random.key(seed), m),
    }


def abstract(state, mesh=None):
    def leaf(x):
        sharding = NamedSharding(mesh, x.sharding.spec) if mesh else x.sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, state)


def raw(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).tobytes()


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and raw(x) == raw(y)


def write(directory, steps, **options):
    with Checkpoints(directory, config=CONFIG, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, small_state(step), metrics={"loss": 1.0})


def entries(directory):
    return sorted(path.name for path in Path(directory).iterdir())


def damage(path, how):
    content = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        middle = len(content) // 2
        flipped = bytes([content[middle] ^ 0x10])
        path.write_bytes(content[:middle] + flipped + content[middle + 1 :])
