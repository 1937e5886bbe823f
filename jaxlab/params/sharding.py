"""From logical axes to mesh axes: one table for parameters and activations.

Everything runs under a mesh with the axes of `MESH_AXES`; one device is a mesh of ones.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxlab.params.paths import path_name
from jaxlab.params.spec import ParamSpec

MESH_AXES = ("data", "fsdp", "tensor", "sequence")

Rules = Mapping[str, str | tuple[str, ...] | None]

RULES: Rules = {
    # activations
    "batch": ("data", "fsdp"),
    "time": "sequence",
    # parameters; "width" is the residual stream's size
    "width": "fsdp",
    "heads": "tensor",
    "hidden": "tensor",
    "vocab": "tensor",
    "layers": None,
}
"""Mesh axes of each logical axis; None leaves the dimension whole."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; -1 for one of them means all remaining devices."""

    data: int = -1  # copies of the parameters, each with its share of the batch
    fsdp: int = 1  # shards of parameters, gathered when used; also splits the batch
    tensor: int = 1  # shards of heads, hidden units and vocabulary
    sequence: int = 1  # shards of the time axis


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices (or those given), with automatic axis types.

    Raises:
        ValueError: the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dataclasses.asdict(cfg)
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"Mesh sizes {sizes} must be positive, with -1 at most once.")
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"Mesh sizes {sizes} do not multiply to the {len(devices)} devices here; "
            "choose sizes with that product, or write -1 for one of them, which then "
            "takes the remaining devices."
        )
    return jax.make_mesh(
        tuple(sizes[name] for name in MESH_AXES),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=devices,
    )


def axis_names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that one entry of a `PartitionSpec` names."""
    return (entry,) if isinstance(entry, str) else entry or ()


def partition_spec(axes: Sequence[str | None], rules: Rules = RULES) -> PartitionSpec:
    """Mesh axes for logical `axes`.

    Raises:
        ValueError: a name is not in the table, or a mesh axis is used twice.
    """
    unknown = [axis for axis in axes if axis is not None and axis not in rules]
    if unknown:
        raise ValueError(f"Axes {unknown} are not in the rules {sorted(rules)}.")
    entries = [None if axis is None else rules[axis] for axis in axes]
    used = [name for entry in entries for name in axis_names(entry)]
    if len(used) != len(set(used)):
        raise ValueError(
            f"Axes {tuple(axes)} map to {entries}: one mesh axis cannot split two "
            "dimensions of one array; change the rules."
        )
    return PartitionSpec(*entries)


def shardings(specs: Any, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> Any:
    """`NamedSharding` for each parameter of a spec tree.

    Raises:
        ValueError: the mesh axes of a dimension do not divide it; the message names
            the parameter.
    """

    def sharding_of(path, spec: ParamSpec) -> NamedSharding:
        sharding = NamedSharding(mesh, partition_spec(spec.axes, rules))
        for axis, size, entry in zip(spec.axes, spec.shape, sharding.spec, strict=True):
            names = axis_names(entry)
            parts = math.prod(mesh.shape[name] for name in names)
            if size % parts:
                raise ValueError(
                    f"{path_name(path)}: its {axis!r} dimension of {size} cannot be "
                    f"split over {parts} devices (mesh axes {names}); choose a size "
                    f"divisible by {parts} or a smaller mesh axis."
                )
        return sharding

    return jax.tree_util.tree_map_with_path(sharding_of, specs)


def constrain(x: Array, *axes: str | None, rules: Rules = RULES) -> Array:
    """Fix the sharding of an activation by logical axis names.

    Outside a mesh from `make_mesh`, as where a layer is used by itself, `x` is returned
    unchanged.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names != MESH_AXES or all(size == 1 for size in mesh.axis_sizes):
        return x
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        return x  # inside shard_map the layout is already explicit
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, rules))


def over_batch_shards(
    function: Callable[[Any, Any], Any], params: Any, rows: Any, rules: Rules = RULES
) -> Any:
    """``function(params, rows)``, computed separately for each device's share of rows.

    For functions that handle the rows of a batch together without needing to, such as
    by one sort of all of them: the compiler would repeat the whole on every device. The
    other mesh axes are left to the compiler. The batch is computed whole outside a mesh
    from `make_mesh`, and where its mesh axes do not divide it.

    Args:
        function: takes `params` and any number of whole rows; the result of a row must
            not depend on the others.
        params: tree of weights, the same for all rows.
        rows: tree of arrays, batch first; so are the results.
    """
    mesh, spec = jax.sharding.get_abstract_mesh(), partition_spec(("batch",), rules)
    names = (spec[0],) if isinstance(spec[0], str) else spec[0] or ()
    if mesh.axis_names != MESH_AXES or any(
        kind != AxisType.Auto for kind in mesh.axis_types
    ):
        return function(params, rows)
    parts = math.prod(mesh.shape[name] for name in names)
    if parts == 1 or any(leaf.shape[0] % parts for leaf in jax.tree.leaves(rows)):
        return function(params, rows)
    return jax.shard_map(
        function,
        in_specs=(PartitionSpec(), spec),
        out_specs=spec,
        axis_names=set(names),
        check_vma=False,  # loops inside start from zeros, which vary over no axis
    )(params, rows)


def place_rows(batch: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Put this process's rows of a global batch on the mesh, split along rows.

    Args:
        batch: tree of numpy arrays, each with this process's share of the rows first.
        mesh: the mesh; it spans the devices of all processes.
        rules: the table of axes.
    """
    sharding = NamedSharding(mesh, partition_spec(("batch",), rules))
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch
    )
