"""One update of parameters: gradient, statistics, optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxlab.objectives.objective import (
    Objective,
    Ratio,
    checked_loss,
    nonzero,
    with_weight,
)
from jaxlab.params import divided_taps, tap, untap


def gradient_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    params: Any,
    opt_state: Any,
    batch: Any,
    key: Array,
    *,
    accumulate: int = 1,
    tapped: Any = None,
    trainable: Any = None,
) -> tuple[Any, Any, dict[str, Array]]:
    """Update parameters by the gradient of total / weight; a pure function.

    Args:
        objective: what is learned.
        optimizer: takes the gradient, and ``value``, total / weight.
        params: the parameters.
        opt_state: the optimizer's state.
        batch: tree of arrays whose first axes are rows.
        key: of the objective's draws; each part gets a key of its own.
        accumulate: parts of the batch that are computed one by one. Part i takes the
            rows i, i + accumulate, ..., some from every device's share.
        tapped: tree of booleans, the weights whose taps the optimizer takes as
            ``stats``; None for none.
        trainable: tree of booleans, the parameters that are learned; the gradients of
            the others are 0. None: all are.

    Returns:
        The next parameters and state, and metrics: ``loss``, the objective's figures,
        ``gradient_norm`` and ``update_norm``. Of J > 1 parts with gradients s_j of
        their totals, and a batch of weight W, also ``part_gradient_norm``, the root
        mean square of the norms of J s_j / W, whose mean is the gradient: beside
        ``gradient_norm`` it says how noisy the parts are, and no gradient is kept for
        it (`jaxlab.optimizers.gradient_variance`).

    Raises:
        TypeError: the objective returns something else than it must.
    """
    weights = tap(params, tapped) if tapped is not None else params

    def part_gradient(part, key):
        def total(weights):
            if trainable is not None:
                weights = jax.tree.map(
                    lambda learned, w: w if learned else jax.lax.stop_gradient(w),
                    trainable,
                    weights,
                )
            total, weight, figures = checked_loss(objective, weights, part, key)
            return total, (Ratio(total, weight), dict(figures))

        grads, sums = jax.grad(total, has_aux=True)(weights)
        return grads, sums

    squares = jnp.zeros(())
    if accumulate == 1:
        grads, sums = part_gradient(batch, key)
    else:
        parts = jax.tree.map(
            lambda a: jnp.swapaxes(a.reshape(-1, accumulate, *a.shape[1:]), 0, 1), batch
        )
        keys = jax.random.split(key, accumulate)

        def one_part(part, key):
            grads, sums = part_gradient(part, key)
            return grads, sums, optax.tree.norm(untap(grads)[0], squared=True)

        def add_part(summed, part_and_key):
            return jax.tree.map(jnp.add, summed, one_part(*part_and_key)), None

        first = jax.tree.map(lambda a: a[0], (parts, keys))
        zeros = jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(one_part, *first)
        )
        grads, sums, squares = jax.lax.scan(add_part, zeros, (parts, keys))[0]

    grads, taps = untap(grads)
    whole, figures = sums
    loss, weight = whole.mean, nonzero(whole.weight)
    grads = jax.tree.map(lambda g: g / weight, grads)
    extra: dict[str, Any] = {"value": loss}
    if tapped is not None:
        extra["stats"] = divided_taps(taps, weight)
    # Optax mixes its integer counts with floats, which a strict setting refuses.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optax.with_extra_args_support(optimizer).update(
            grads, opt_state, params, **extra
        )
    ratios = with_weight(figures, whole.weight)
    metrics = {"loss": loss} | {name: ratio.mean for name, ratio in ratios.items()}
    metrics["gradient_norm"] = optax.tree.norm(grads)
    metrics["update_norm"] = optax.tree.norm(updates)
    if accumulate > 1:
        metrics["part_gradient_norm"] = jnp.sqrt(accumulate * squares) / weight
    return optax.apply_updates(params, updates), opt_state, metrics
