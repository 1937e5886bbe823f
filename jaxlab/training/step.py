"""One update: loss, gradient, optimizer."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlab import models
from jaxlab.models import LMConfig
from jaxlab.optimizers import reported
from jaxlab.params import divided_taps, tap, untap
from jaxlab.training.state import TrainState, abstract_state


def make_train_step(
    cfg: LMConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    accumulate: int = 1,
    tapped: Any = None,
    norm_test: bool = False,
) -> Callable[[TrainState, Any], tuple[TrainState, dict]]:
    """The jitted function ``(state, batch) -> (state, metrics)``; donates the state.

    Made under the mesh in use; a step leaves the state on the devices as
    `create_state` puts it, so that one program serves all steps.

    The loss is the mean of the targets' negative log-likelihood (nats) over weights. A
    batch accumulated in parts gives the gradient of the whole batch's mean, whatever
    the parts weigh. Auxiliary losses of mixers are added; each part has its own, which
    counts as much as the part weighs.

    Besides the losses and norms, the metrics have what the optimizer's state reports
    (`jaxlab.optimizers.reported`). With a norm test they have its two numbers, for J
    parts with gradients s_j of their sums, weight W of the batch and g = sum_j s_j / W:
    ``part_squares``, (J / W)^2 sum_j ||s_j||^2, and ``mean_square``, ||g||^2. No
    gradient is kept for them.

    Args:
        cfg: the model.
        optimizer: of the loss.
        accumulate: parts of a batch that go through the model one by one.
        tapped: tree of booleans, the weights whose taps the optimizer takes as
            ``stats``; None for none.
        norm_test: whether to measure what `jaxlab.optimizers.gradient_variance` takes.
    """

    def total_loss(params, batch):
        """The part's sum of both losses; the two by themselves."""
        logits, auxiliary = models.forward_with_auxiliary_loss(
            params, batch["inputs"], cfg, segment_ids=batch["segment_ids"]
        )
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        nats = jnp.sum(nats * batch["weights"])
        auxiliary *= jnp.sum(batch["weights"])
        return nats + auxiliary, (nats, auxiliary)

    def part_gradient(params, part):
        grads, sums = jax.grad(total_loss, has_aux=True)(params, part)
        if norm_test:
            sums = (*sums, optax.tree.norm(untap(grads)[0], squared=True))
        return grads, sums

    def gradient(params, batch):
        if accumulate == 1:
            return part_gradient(params, batch)

        def add_part(sums, part):
            return jax.tree.map(jnp.add, sums, part_gradient(params, part)), None

        # Interleaved, so that a part takes rows from every device's share.
        parts = jax.tree.map(
            lambda a: jnp.swapaxes(a.reshape(-1, accumulate, *a.shape[1:]), 0, 1),
            batch,
        )
        zeros = jnp.zeros(()), jnp.zeros(())
        zeros = (*zeros, jnp.zeros(())) if norm_test else zeros
        zeros = jax.tree.map(jnp.zeros_like, params), zeros
        return jax.lax.scan(add_part, zeros, parts)[0]

    lies = abstract_state(cfg, optimizer, jax.sharding.get_mesh())
    lies = jax.tree.map(lambda x: x.sharding, lies)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(lies, None))
    def train_step(state: TrainState, batch):
        weights = tap(state.params, tapped) if tapped is not None else state.params
        grads, (nats, auxiliary, *squares) = gradient(weights, batch)
        grads, taps = untap(grads)
        weight = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        taps = {"stats": divided_taps(taps, weight)} if tapped is not None else {}
        loss, auxiliary_loss = nats / weight, auxiliary / weight
        # Optax mixes its integer counts with floats, which a strict setting refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(
                *(grads, state.opt_state, state.params),
                value=loss + auxiliary_loss,
                **taps,
            )
        state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
        )
        metrics = {
            "loss": loss,
            "gradient_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            **reported(opt_state),
        }
        if norm_test:
            metrics["part_squares"] = jnp.square(accumulate / weight) * squares[0]
            metrics["mean_square"] = optax.tree.norm(grads, squared=True)
        if any(models.has_auxiliary_loss(mixer) for mixer in cfg.pattern):
            metrics["auxiliary_loss"] = auxiliary_loss
        if "bytes" in batch:
            text_bytes = jnp.maximum(jnp.sum(batch["bytes"] * batch["weights"]), 1.0)
            metrics["bits_per_byte"] = nats / math.log(2) / text_bytes
        return state, metrics

    return train_step
