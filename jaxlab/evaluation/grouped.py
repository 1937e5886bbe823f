"""Loss and accuracy of held-out targets by position or by the depth of a needle."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlab.data import Batch
from jaxlab.evaluation.heldout import score_tokens
from jaxlab.layers import segments
from jaxlab.models import LMConfig, weighted
from jaxlab.params import place_rows


def loss_by_position(
    params: Any,
    cfg: LMConfig,
    batches: Iterable[Batch],
    mesh: Mesh,
    *,
    edges: Sequence[int],
) -> dict[str, np.ndarray]:
    """Score targets by the number of earlier tokens in their document.

    The target of input t of a document has position t (from 0). In packed rows each
    document is counted from its own start. Positions outside the edges are ignored.

    Args:
        params: the model's parameters.
        cfg: the model.
        batches: see `jaxlab.data`; each process passes its own rows.
        mesh: the mesh the parameters are on.
        edges: increasing; bin i contains the positions edges[i] <= p < edges[i + 1].

    Returns:
        numpy arrays ``[bins]``, NaN where a bin is empty: ``loss`` (nats a target),
        ``accuracy``, ``weight`` (targets), and for text ``bits_per_byte``.

    Raises:
        ValueError: the edges do not increase, or there are no batches.
    """

    def position(batch):
        ids = batch["segment_ids"]
        return segments.positions(ids, jnp.zeros(ids.shape[0], jnp.int32))

    return _grouped(params, cfg, batches, mesh, position, edges)


def recall_by_depth(
    params: Any, cfg: LMConfig, batches: Iterable[Batch], mesh: Mesh, *, bins: int = 8
) -> dict[str, np.ndarray]:
    """Score rows of `jaxlab.data.NeedleInHaystack` by the depth of the needle.

    Args:
        params, cfg, batches, mesh: as in `loss_by_position`.
        bins: number of equal parts of the depth, which is 0 at the first place in a row
            and 1 at the last.

    Returns:
        The same arrays as `loss_by_position`.

    Raises:
        ValueError: the batches have no depth, or there are no batches.
    """

    def depth(batch):
        if "depth" not in batch:
            raise ValueError(
                f"The batches have {sorted(batch)}, but recall by depth also needs "
                "depth; use the rows of NeedleInHaystack."
            )
        bin_of_row = jnp.minimum(batch["depth"] * bins, bins - 1).astype(jnp.int32)
        return jnp.broadcast_to(bin_of_row[:, None], batch["targets"].shape)

    return _grouped(params, cfg, batches, mesh, depth, range(bins + 1))


def _grouped(
    params,
    cfg: LMConfig,
    batches: Iterable[Batch],
    mesh: Mesh,
    quantity: Callable[[dict], jax.Array],
    edges: Sequence[int],
) -> dict[str, np.ndarray]:
    edges = tuple(edges)
    if len(edges) < 2 or any(b <= a for a, b in zip(edges, edges[1:], strict=False)):
        raise ValueError(
            f"edges={list(edges)} must be at least two increasing numbers."
        )
    sums_of = jax.jit(functools.partial(_sums, cfg=cfg, quantity=quantity, edges=edges))
    parts = [sums_of(params, place_rows(batch, mesh)) for batch in batches]
    if not parts:
        raise ValueError("There are no held-out batches to evaluate on.")
    sums = jax.tree.map(
        lambda *arrays: np.sum(np.asarray(arrays, np.float64), axis=0),
        *jax.device_get(parts),
    )

    def ratio(a, b):
        return np.divide(a, b, out=np.full(len(edges) - 1, np.nan), where=b > 0)

    result = {
        "loss": ratio(sums["nats"], sums["weight"]),
        "accuracy": ratio(sums["right"], sums["weight"]),
        "weight": sums["weight"],
    }
    if "bytes" in sums:
        result["bits_per_byte"] = ratio(sums["nats"] / math.log(2), sums["bytes"])
    return result


def _sums(params, batch, *, cfg: LMConfig, quantity, edges) -> dict[str, jax.Array]:
    nats, right = score_tokens(params, batch, cfg)
    group = jnp.searchsorted(jnp.array(edges), quantity(batch), side="right") - 1
    inside = (group >= 0) & (group < len(edges) - 1)
    weights = jnp.where(inside, batch["weights"], 0.0)

    def by_group(values):
        parts = weighted(values, weights)
        return jnp.zeros(len(edges) - 1).at[group].add(parts, mode="drop")

    sums = {
        "nats": by_group(nats),
        "right": by_group(right),
        "weight": by_group(jnp.ones_like(weights)),
    }
    if "bytes" in batch:
        sums["bytes"] = by_group(batch["bytes"])
    return sums
