"""Optimizers: optax transformations, one method a file; and schedules."""

from jaxlab.optimizers.adamw import AdamW
from jaxlab.optimizers.schedules import (
    Rewarming,
    Schedule,
    WarmupCosine,
    WarmupStableDecay,
)

__all__ = ["AdamW", "Rewarming", "Schedule", "WarmupCosine", "WarmupStableDecay"]
