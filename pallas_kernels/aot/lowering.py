"""Lowering for a device that is not present."""

import jax
import numpy as np
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
)


def lower_on(device, platform: str, function, *shapes) -> jax.stages.Lowered:
    """Lower a function for a device of a described topology.

    Args:
        platform: "tpu" or "cuda".
        function: to donate arguments, pass a jitted function.
    """
    sharding = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    abstract = AbstractMesh(
        (1,),
        ("x",),
        axis_types=(AxisType.Auto,),
        abstract_device=AbstractDevice(
            device_kind=device.device_kind,
            num_cores=getattr(device, "num_cores", None),
            platform=platform,
        ),
    )
    with jax.sharding.use_abstract_mesh(abstract):
        jitted = function if hasattr(function, "lower") else jax.jit(function)
        return jitted.lower(*shapes)
