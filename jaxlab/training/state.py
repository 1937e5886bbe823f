"""Everything that training changes, sharded from the first moment."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from jaxlab import models, params
from jaxlab.models import LMConfig
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
    cfg: LMConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without memory."""
    specs = models.spec(cfg)
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
    cfg: LMConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int
) -> TrainState:
    """A state at step 0; each device makes only its own shards."""
    shardings = jax.tree.map(
        lambda shape: shape.sharding, abstract_state(cfg, optimizer, mesh)
    )
    create = jax.jit(lambda key: _create(cfg, optimizer, key), out_shardings=shardings)
    return create(jax.random.key(seed))


def _create(cfg, optimizer, key) -> TrainState:
    arrays = models.init(cfg, key)
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=arrays, opt_state=optimizer.init(arrays)
    )
