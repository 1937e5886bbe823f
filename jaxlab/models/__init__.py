"""Models built of mixers."""

from jaxlab.models.language_model import (
    LMConfig,
    forward,
    init,
    init_state,
    spec,
    step,
)

__all__ = ["LMConfig", "forward", "init", "init_state", "spec", "step"]
