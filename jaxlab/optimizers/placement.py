"""The sharding of an optimizer's state over a mesh."""

import math
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxlab.params import abstract, axis_names, shardings


def abstract_opt_state(
    optimizer: optax.GradientTransformation, specs: Any, mesh: Mesh | AbstractMesh
) -> Any:
    """Return the shapes, dtypes and shardings of an optimizer's state.

    Nothing is allocated. An array in a parameter's place is sharded like the parameter,
    except along a dimension that is shorter than the parameter's and that the devices
    do not divide. All other arrays are replicated.

    Args:
        optimizer: any optax transformation.
        specs: tree of `ParamSpec`.
        mesh: a mesh from `make_mesh`, or an abstract one with its axes.
    """

    def shapes_for(params: Any) -> Any:
        return jax.eval_shape(lambda: optimizer.init(params))

    shapes = shapes_for(abstract(specs))
    replicated = NamedSharding(mesh, PartitionSpec())
    placed = optax.tree_utils.tree_map_params(
        shapes_for,  # the optimizer itself would allocate its state
        _split_like,
        shapes,
        shardings(specs, mesh),
        transform_non_params=lambda _: replicated,
        is_leaf=_is_left_out,
    )

    def place(sharding, part):  # one sharding may stand for a part of the state
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part
        )

    return jax.tree.map(place, placed, shapes)


def _split_like(kept: Any, sharding: NamedSharding) -> Any:
    """A parameter's sharding, but unsplit along dimensions of `kept` that it cannot."""
    if _is_left_out(kept):
        return kept

    def divides(size, entry):
        parts = math.prod(sharding.mesh.shape[name] for name in axis_names(entry))
        return size % parts == 0

    entries = zip(kept.shape, sharding.spec, strict=True)
    spec = [entry if divides(size, entry) else None for size, entry in entries]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _is_left_out(kept: Any) -> bool:
    """Whether `optax.masked` has left a parameter out of the state."""
    return isinstance(kept, optax.MaskedNode)
