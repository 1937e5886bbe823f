"""The language model, built from mixers; and, in a file of its own, a perceptron."""

from jaxlab.models.language_model import (
    LMConfig,
    forward,
    forward_with_auxiliary_loss,
    has_auxiliary_loss,
    hidden,
    hidden_step,
    hidden_with_auxiliary_loss,
    init,
    init_state,
    logits,
    spec,
    step,
)
from jaxlab.models.likelihood import (
    map_logits,
    next_token_nats,
    token_nats,
    weighted,
)
from jaxlab.models.states import insert_rows, repeat_rows, take_rows

__all__ = [
    "LMConfig",
    "forward",
    "forward_with_auxiliary_loss",
    "has_auxiliary_loss",
    "hidden",
    "hidden_step",
    "hidden_with_auxiliary_loss",
    "init",
    "init_state",
    "insert_rows",
    "logits",
    "map_logits",
    "next_token_nats",
    "repeat_rows",
    "spec",
    "step",
    "take_rows",
    "token_nats",
    "weighted",
]
