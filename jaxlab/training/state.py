"""Everything that training changes, sharded from the first moment."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from jaxlab import params
from jaxlab.optimizers.placement import abstract_opt_state


@struct.dataclass
class TrainState:
    """The state of a run.

    Attributes:
        step: int32, updates made so far.
        params: the model's parameters.
        opt_state: the optimizer's state.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any


def abstract_state(
    specs: Any, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without memory.

    Args:
        specs: of the parameters.
        optimizer: of them.
        mesh: of the devices.
    """
    return TrainState(
        step=_abstract(jnp.zeros((), jnp.int32), NamedSharding(mesh, PartitionSpec())),
        params=jax.tree.map(
            _abstract, params.abstract(specs), params.shardings(specs, mesh)
        ),
        opt_state=abstract_opt_state(optimizer, specs, mesh),
    )


def _abstract(x: Any, sharding: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def create_state(
    specs: Any, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int
) -> TrainState:
    """A state at step 0; each device makes only its own shards."""
    shardings = jax.tree.map(
        lambda shape: shape.sharding, abstract_state(specs, optimizer, mesh)
    )

    def create(key):
        arrays = params.init(specs, key)
        return TrainState(jnp.zeros((), jnp.int32), arrays, optimizer.init(arrays))

    return jax.jit(create, out_shardings=shardings)(jax.random.key(seed))
