"""What each optimizer keeps, and what devices exchange for it, from shapes alone.

    python -m benchmarks.optimizers.costs

For the model of configs/tiny.py and for a larger one: the state, also that of a device
that has one of eight shards of the parameters, and the bytes that each of eight copies
exchanges a step. `tests/training/test_exchange.py` holds such figures against compiled
steps. K-FAC is not in the library; its figures are a formula, `kfac_costs`. Writes
`results/optimizer_costs.json`.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from benchmarks.record import record
from configs import tiny
from jaxlab import models
from jaxlab.mixers import delta_product
from jaxlab.models import LMConfig
from jaxlab.optimizers import (
    FRUGAL,
    LAMB,
    MKOR,
    SGD,
    SOAP,
    AdAdaGrad,
    AdamW,
    Costs,
    Muon,
    Shampoo,
    costs,
    preconditioned,
)
from jaxlab.params import MESH_AXES, ParamSpec, axis_names, partition_spec

DEVICES = 8
MODELS = {
    "tiny": tiny.config.model,
    "width 1024, 12 layers": LMConfig(
        vocab_size=32_768,
        width=1024,
        n_layers=12,
        pattern=(delta_product.Config(1024, n_heads=8, n_householders=2),),
    ),
}
OPTIMIZERS = {
    "AdamW": AdamW(),
    "LAMB": LAMB(),
    "SGD": SGD(),
    "Muon": Muon(),
    "AdAdaGrad": AdAdaGrad(),
    "FRUGAL, density 0.25": FRUGAL(density=0.25),
    "SOAP": SOAP(),
    "Shampoo": Shampoo(),
    "MKOR, LAMB": MKOR(base=LAMB()),
}
STEPS = 1000  # of a run; costs do not depend on it


def main() -> None:
    """Report and record."""
    found = {name: of_model(models.spec(cfg)) for name, cfg in MODELS.items()}
    for name, optimizers in found.items():
        for optimizer, each in optimizers.items():
            print(name, optimizer, each)
    print(f"Wrote {record('optimizer_costs', copies=DEVICES, models=found)}.")


def of_model(specs: Any) -> dict[str, dict[str, int]]:
    """Costs by the optimizer's name: of copies, and the state of a shard."""
    copies, shards = mesh(data=DEVICES), mesh(fsdp=DEVICES)
    found = {}
    for name, optimizer in OPTIMIZERS.items():
        tapped = optimizer.tapped(specs) if isinstance(optimizer, MKOR) else None
        built = optimizer.build(specs, STEPS)
        found[name] = [costs(built, specs, m, tapped=tapped) for m in (copies, shards)]
    matrices = preconditioned(specs)
    found["K-FAC, LAMB"] = [
        kfac_costs(c, specs, m, matrices)
        for c, m in zip(found["LAMB"], (copies, shards), strict=True)
    ]
    return {
        name: {**dataclasses.asdict(copy), "state_a_shard": shard.state_a_device}
        for name, (copy, shard) in found.items()
    }


def kfac_costs(
    base: Costs, specs: Any, mesh: Mesh | AbstractMesh, tapped: Any
) -> Costs:
    """Return what K-FAC in front of an optimizer would cost: a formula to compare with.

    For a weight [in, out] devices sum the factors [in, in] and [out, out], and the
    devices that invert a factor send its inverse to the others: 2 (in^2 + out^2)
    numbers, and as many are kept; 4 d^2 if both sides are d. Numbers are float32,
    factors are on every device, and both halves of symmetric matrices count: sending
    one half takes about half of these bytes. They are the bytes of a step that renews
    factors and inverses.

    Args:
        base: costs of the optimizer behind it.
        specs: tree of `ParamSpec`.
        mesh: as in `costs`; nothing is exchanged where all devices have all tokens.
        tapped: tree of booleans, the weights that have factors.

    Reference: Mozaffari et al., MKOR, arXiv 2306.01685, table 1.
    """
    pairs = zip(jax.tree.leaves(specs), jax.tree.leaves(tapped), strict=True)
    more = sum(_factor_bytes(spec) for spec, has_factors in pairs if has_factors)
    axes = [name for e in partition_spec(("batch", "time")) for name in axis_names(e)]
    shares_of_tokens = math.prod(mesh.shape[name] for name in axes)
    return dataclasses.replace(
        base,
        state=base.state + more,
        state_a_device=base.state_a_device + more,
        statistics=base.statistics + (more if shares_of_tokens > 1 else 0),
    )


def _factor_bytes(spec: ParamSpec) -> int:
    *stack, n_in, n_out = spec.shape
    float32 = 4
    return float32 * math.prod(stack) * 2 * (n_in**2 + n_out**2)


def mesh(**sizes: int) -> AbstractMesh:
    """A mesh without devices."""
    return AbstractMesh(
        tuple(sizes.get(name, 1) for name in MESH_AXES),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
    )


if __name__ == "__main__":
    main()
