"""Loss and accuracy on held-out batches."""

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxlab import models
from jaxlab.data import Batch
from jaxlab.models import LMConfig
from jaxlab.params import place_rows


def evaluate(
    params: Any, cfg: LMConfig, batches: Iterable[Batch], mesh: Mesh
) -> dict[str, Any]:
    """Average the loss and accuracy over all targets of weight 1.

    Args:
        params: the model's parameters.
        cfg: the model.
        batches: see `jaxlab.data`; each process passes its own rows.
        mesh: the mesh the parameters are on.

    Returns:
        ``loss`` (nats a target), ``accuracy`` (share of targets that are the most
        likely token), ``row_accuracy`` (share of rows with every target right),
        ``accuracy_by_position`` and ``prefix_accuracy`` (numpy ``[T]``: share of rows
        that are right at t, and that are right at t and everywhere before), and for
        text ``bits_per_byte``.

    Raises:
        ValueError: there is no target to score.
    """
    parts = [_sums(params, place_rows(batch, mesh), cfg) for batch in batches]
    if not parts:
        raise ValueError("There are no held-out batches to evaluate on.")
    sums = jax.tree.map(
        lambda *arrays: np.sum(np.asarray(arrays, np.float64), axis=0),
        *jax.device_get(parts),
    )
    if sums["weight"] == 0:
        raise ValueError("The held-out batches have no target to score.")
    targets_at = np.maximum(sums["weight_at"], 1)
    rows = np.maximum(sums["rows"], 1)
    result = {
        "loss": float(sums["nats"] / sums["weight"]),
        "accuracy": float(sums["right_at"].sum() / sums["weight"]),
        "row_accuracy": float(sums["prefix_right"][-1] / rows),
        "accuracy_by_position": sums["right_at"] / targets_at,
        "prefix_accuracy": sums["prefix_right"] / rows,
    }
    if "bytes" in sums:
        result["bits_per_byte"] = float(sums["nats"] / math.log(2) / sums["bytes"])
    return result


def score_tokens(
    params: Any, batch: Any, cfg: LMConfig
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Return each target's nats, and 1 where it is the most likely token, else 0."""
    x, _ = models.hidden(params, batch["inputs"], cfg, segment_ids=batch["segment_ids"])

    def score(logits, targets):
        right = jnp.argmax(logits, axis=-1) == targets
        return models.token_nats(logits, targets), right.astype(jnp.float32)

    return models.map_logits(score, params, x, cfg, batch["targets"])


@functools.partial(jax.jit, static_argnames="cfg")
def _sums(params, batch, cfg: LMConfig) -> dict[str, Any]:
    nats, right = score_tokens(params, batch, cfg)
    weights = batch["weights"]
    right_so_far = jnp.cumprod(jnp.where(weights > 0, right, 1.0), axis=1)
    is_row = jnp.any(weights > 0, axis=1, keepdims=True)
    sums = {
        "nats": jnp.sum(models.weighted(nats, weights)),
        "weight": jnp.sum(weights),
        "weight_at": jnp.sum(weights, axis=0),
        "right_at": jnp.sum(right * weights, axis=0),
        "prefix_right": jnp.sum(jnp.where(is_row, right_so_far, 0.0), axis=0),
        "rows": jnp.sum(is_row.astype(jnp.float32)),
    }
    if "bytes" in batch:
        sums["bytes"] = jnp.sum(batch["bytes"] * weights)
    return sums
