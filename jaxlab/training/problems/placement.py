"""States of searches on the devices of a mesh."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array


def placed(state: Any) -> Any:
    """The state on the mesh in use; what is on no mesh yet is copied to all devices."""
    whole = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())

    def place(x: Array) -> Array:
        on_a_mesh = isinstance(x.sharding, NamedSharding)
        return x if on_a_mesh else jax.device_put(x, whole)

    return jax.tree.map(place, state)


def abstract(state: Any) -> Any:
    """The shapes, dtypes and shardings of a state."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def compiled(update: Callable[..., tuple[Any, Any]], state: Any) -> Callable[..., Any]:
    """An update, jitted, that leaves the state on the devices as it found it.

    So that the first step's program is that of all.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(update, out_shardings=(shardings, None))
