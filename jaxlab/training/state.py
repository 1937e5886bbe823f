"""Everything that training changes, sharded from the first moment."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from jaxlab import models, params
from jaxlab.models import LMConfig


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
    """Shapes, dtypes and shardings of the state, without memory.

    Whatever the optimizer keeps in a parameter's place is split as the parameter is,
    but for dimensions that it keeps in part and the devices do not divide.
    """
    specs = models.spec(cfg)
    shapes = jax.eval_shape(lambda: _create(cfg, optimizer, jax.random.key(0)))
    whole = NamedSharding(mesh, PartitionSpec())
    by_param = params.shardings(specs, mesh)
    shardings: Any = TrainState(
        step=whole,  # pyright: ignore[reportArgumentType]
        params=by_param,
        opt_state=optax.tree_utils.tree_map_params(
            optimizer,
            _split_like,
            shapes.opt_state,
            by_param,
            transform_non_params=lambda _: whole,
            is_leaf=_is_left_out,
        ),
    )
    return jax.tree.map(
        lambda shape, s: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=s),
        shapes,
        shardings,
    )


def _split_like(kept: Any, sharding: NamedSharding) -> Any:
    """A parameter's sharding, whole along what its devices do not divide in `kept`."""
    if _is_left_out(kept):
        return kept

    def divides(size, entry):
        names = (entry,) if isinstance(entry, str) else entry or ()
        return size % math.prod(sharding.mesh.shape[name] for name in names) == 0

    entries = zip(kept.shape, sharding.spec, strict=True)
    spec = [entry if divides(size, entry) else None for size, entry in entries]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _is_left_out(kept: Any) -> bool:
    """Whether `optax.masked` keeps nothing in a parameter's place."""
    return isinstance(kept, optax.MaskedNode)


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
