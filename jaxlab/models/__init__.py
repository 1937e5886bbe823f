"""Models built of mixers."""

from jaxlab.models.language_model import (
    LMConfig,
    forward,
    forward_with_auxiliary_loss,
    has_auxiliary_loss,
    init,
    init_state,
    spec,
    step,
)

__all__ = [
    "LMConfig",
    "forward",
    "forward_with_auxiliary_loss",
    "has_auxiliary_loss",
    "init",
    "init_state",
    "spec",
    "step",
]
