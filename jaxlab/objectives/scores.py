"""The figures of an objective on held-out batches."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlab.objectives.objective import (
    Objective,
    Ratio,
    checked_loss,
    with_weight,
)
from jaxlab.params import place_rows


def heldout_scores(
    objective: Objective, params: Any, batches: Iterable[Any], mesh: Mesh
) -> dict[str, Any]:
    """Return the means of the loss and of the figures over all batches.

    An objective with better scores, such as the accuracies of `NextToken`, returns them
    from its own ``scores(params, batches, mesh)``.

    Args:
        objective: the objective that was learned.
        params: the parameters.
        batches: each process passes its own rows; all batches use the same key.
        mesh: the mesh the parameters are on.

    Returns:
        ``loss`` and the other figures of the objective.

    Raises:
        ValueError: there is nothing to score.
    """
    scores = getattr(objective, "scores", None)
    if scores is not None:
        return scores(params, batches, mesh)
    sums_of = jax.jit(functools.partial(_sums, objective))
    parts = [jax.device_get(sums_of(params, place_rows(b, mesh))) for b in batches]
    if not parts:
        raise ValueError("There are no held-out batches to evaluate on.")
    sums = jax.tree.map(lambda *x: np.sum(np.asarray(x, np.float64)), *parts)
    if sums["loss"].weight == 0:
        raise ValueError(
            "The held-out batches have weight 0, so there is nothing to score."
        )
    return {
        name: float(figure.total / figure.weight) if figure.weight else float("nan")
        for name, figure in sums.items()
    }


def _sums(objective: Objective, params: Any, batch: Any) -> dict[str, Ratio]:
    key = jax.random.key(0)
    total, weight, figures = checked_loss(objective, params, batch, key)
    return {"loss": Ratio(total, weight)} | with_weight(figures, weight)
