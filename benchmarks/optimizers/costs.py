"""The state of each optimizer and the bytes exchanged for it, from shapes alone.

    python -m benchmarks.optimizers.costs

For the model of configs/tiny.py and for a larger one: the size of the state, in all and
on a device that has one of eight shards of the parameters, and the bytes that each of
eight copies exchanges in a step. `tests/training/test_exchange.py` compares such
figures with compiled steps. K-FAC, which the library does not have, is estimated by
`kfac_costs`. Writes `results/optimizer_costs.json`.
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
STEPS = 1000  # in a run; costs do not depend on it


def main() -> None:
    """Compute, print and record."""
    by_model = {name: of_model(models.spec(cfg)) for name, cfg in MODELS.items()}
    for name, optimizers in by_model.items():
        for optimizer, figures in optimizers.items():
            print(name, optimizer, figures)
    print(f"Wrote {record('optimizer_costs', copies=DEVICES, models=by_model)}.")


def of_model(specs: Any) -> dict[str, dict[str, int]]:
    """The costs of each optimizer with copied parameters, and the state of a shard."""
    copies, shards = mesh(data=DEVICES), mesh(fsdp=DEVICES)
    pairs = {}
    for name, optimizer in OPTIMIZERS.items():
        tapped = optimizer.tapped(specs) if isinstance(optimizer, MKOR) else None
        built = optimizer.build(specs, STEPS)
        pairs[name] = [costs(built, specs, m, tapped=tapped) for m in (copies, shards)]
    matrices = preconditioned(specs)
    pairs["K-FAC, LAMB"] = [
        kfac_costs(c, specs, m, matrices)
        for c, m in zip(pairs["LAMB"], (copies, shards), strict=True)
    ]
    return {
        name: {**dataclasses.asdict(copy), "state_a_shard": shard.state_a_device}
        for name, (copy, shard) in pairs.items()
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
