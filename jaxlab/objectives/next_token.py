"""Next-token likelihood: how well a language model predicts each token of a text.

    total = -sum_t w_t log p(y_t | x_1 .. x_t),     weight = sum_t w_t

Auxiliary losses of mixers, such as a router's balance, are added: their mean over
layers times the weight.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from jaxlab import models
from jaxlab.evaluation import evaluate
from jaxlab.models import LMConfig
from jaxlab.objectives.objective import Figure, Ratio


@dataclasses.dataclass(frozen=True)
class NextToken:
    """The negative log-likelihood of a batch's targets.

    A batch has ``inputs``, ``targets`` and ``segment_ids`` (int ``[B, T]``),
    ``weights`` (float ``[B, T]``; 0 leaves a target out, whatever it is), and for text
    ``bytes`` (float ``[B, T]``), the number of bytes in each target.

    The figures are ``loss`` (nats a target, without auxiliary losses),
    ``auxiliary_loss`` if a mixer has one, and for text ``bits_per_byte``.
    """

    model: LMConfig = LMConfig()

    def spec(self) -> Any:
        """Return the specs of the model's parameters."""
        return models.spec(self.model)

    def loss(self, params: Any, batch: Any, key: Array | None = None):
        """Return (total, weight, figures), see `jaxlab.objectives`; ignores the key."""
        del key
        x, auxiliary = models.hidden_with_auxiliary_loss(
            params, batch["inputs"], self.model, segment_ids=batch["segment_ids"]
        )
        nats = models.next_token_nats(params, x, batch["targets"], self.model)
        nats = jnp.sum(models.weighted(nats, batch["weights"]))
        weight = jnp.sum(batch["weights"])
        total = nats
        figures: dict[str, Figure] = {"loss": nats}
        if models.has_auxiliary_loss(self.model):
            total = nats + auxiliary * weight
            figures["auxiliary_loss"] = auxiliary * weight
        if "bytes" in batch:
            text_bytes = jnp.sum(batch["bytes"] * batch["weights"])
            figures["bits_per_byte"] = Ratio(nats / math.log(2), text_bytes)
        return total, weight, figures

    def scores(self, params: Any, batches: Iterable[Any], mesh: Mesh) -> dict[str, Any]:
        """Score the model with `jaxlab.evaluation.evaluate`."""
        return evaluate(params, self.model, batches, mesh)
