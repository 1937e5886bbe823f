"""Parameters: declared once, used through four functions, sharded by one table."""

from jaxlab.params.leaves import (
    LowRank,
    Quantized,
    Tap,
    Tapped,
    Weight,
    embed,
    linear,
    linear_t,
    quantize,
    tapped,
    value,
)
from jaxlab.params.paths import named_leaves, path_name, select
from jaxlab.params.sharding import (
    MESH_AXES,
    RULES,
    MeshConfig,
    constrain,
    make_mesh,
    partition_spec,
    place_rows,
    shardings,
)
from jaxlab.params.spec import ROLES, ParamSpec, abstract, count, fan_in, init, stack

__all__ = [
    "MESH_AXES",
    "ROLES",
    "RULES",
    "LowRank",
    "MeshConfig",
    "ParamSpec",
    "Quantized",
    "Tap",
    "Tapped",
    "Weight",
    "abstract",
    "constrain",
    "count",
    "embed",
    "fan_in",
    "init",
    "linear",
    "linear_t",
    "make_mesh",
    "named_leaves",
    "partition_spec",
    "path_name",
    "place_rows",
    "quantize",
    "select",
    "shardings",
    "stack",
    "tapped",
    "value",
]
