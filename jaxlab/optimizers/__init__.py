"""Optimizers as optax transformations, one method a file, and schedules."""

from jaxlab.optimizers.adadagrad import (
    AdAdaGrad,
    adadagrad,
    scale_by_adagrad,
    scale_by_adagrad_norm,
)
from jaxlab.optimizers.adamw import AdamW
from jaxlab.optimizers.cost import Costs, costs, state_bytes
from jaxlab.optimizers.frugal import FRUGAL, frugal, scale_by_frugal
from jaxlab.optimizers.lamb import LAMB, lamb, scale_by_layer_norms
from jaxlab.optimizers.mkor import MKOR, mkor, preconditioned, scale_by_mkor
from jaxlab.optimizers.muon import Muon, muon
from jaxlab.optimizers.norm_test import (
    BatchController,
    BatchGrowth,
    BatchState,
    gradient_variance,
    wanted_batch,
)
from jaxlab.optimizers.partial import build_for
from jaxlab.optimizers.reporting import events, reported
from jaxlab.optimizers.schedules import (
    Infinite,
    Rewarming,
    Schedule,
    WarmupCosine,
    WarmupStableDecay,
)
from jaxlab.optimizers.settings import Optimizer
from jaxlab.optimizers.sgd import SGD
from jaxlab.optimizers.shampoo import Shampoo, scale_by_shampoo, shampoo
from jaxlab.optimizers.soap import SOAP, scale_by_soap, soap
from jaxlab.optimizers.statistics import tapped_by
from jaxlab.optimizers.switching import Switch, left_at, while_it_pays

__all__ = [
    "FRUGAL",
    "LAMB",
    "MKOR",
    "SGD",
    "SOAP",
    "AdAdaGrad",
    "AdamW",
    "BatchController",
    "BatchGrowth",
    "BatchState",
    "Costs",
    "Infinite",
    "Muon",
    "Optimizer",
    "Rewarming",
    "Schedule",
    "Shampoo",
    "Switch",
    "WarmupCosine",
    "WarmupStableDecay",
    "adadagrad",
    "build_for",
    "costs",
    "events",
    "frugal",
    "gradient_variance",
    "lamb",
    "left_at",
    "mkor",
    "muon",
    "preconditioned",
    "reported",
    "scale_by_adagrad",
    "scale_by_adagrad_norm",
    "scale_by_frugal",
    "scale_by_layer_norms",
    "scale_by_mkor",
    "scale_by_shampoo",
    "scale_by_soap",
    "shampoo",
    "soap",
    "state_bytes",
    "tapped_by",
    "wanted_batch",
    "while_it_pays",
]
