"""Optimizers: optax transformations, one method a file; and schedules."""

from jaxlab.optimizers.adadagrad import (
    AdAdaGrad,
    BatchController,
    BatchGrowth,
    BatchState,
    gradient_variance,
    scale_by_adagrad,
    scale_by_adagrad_norm,
    wanted_batch,
)
from jaxlab.optimizers.adamw import AdamW
from jaxlab.optimizers.cost import state_bytes
from jaxlab.optimizers.frugal import FRUGAL, scale_by_frugal
from jaxlab.optimizers.schedules import (
    Infinite,
    Rewarming,
    Schedule,
    WarmupCosine,
    WarmupStableDecay,
)

__all__ = [
    "FRUGAL",
    "AdAdaGrad",
    "AdamW",
    "BatchController",
    "BatchGrowth",
    "BatchState",
    "Infinite",
    "Rewarming",
    "Schedule",
    "WarmupCosine",
    "WarmupStableDecay",
    "gradient_variance",
    "scale_by_adagrad",
    "scale_by_adagrad_norm",
    "scale_by_frugal",
    "state_bytes",
    "wanted_batch",
]
