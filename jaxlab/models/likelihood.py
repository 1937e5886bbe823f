"""The likelihood of tokens, from logits and from hidden states.

The logits of all positions are a model's largest array, ``[B, T, W]``. `map_logits`
computes them for one block of positions at a time, and again in the backward pass, so
that only one block exists at once; `next_token_nats` computes the loss this way.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxlab.models.language_model import LMConfig, logits

BLOCK = 512
"""The default number of positions of each row whose logits exist at once."""


def token_nats(
    logits: Float[Array, "*rows W"],
    tokens: Int[Array, "*rows"],
    temperature: float = 1.0,
) -> Float[Array, "*rows"]:
    """``-log softmax(logits / temperature)[token]``.

    Args:
        logits: ``[..., W]``.
        tokens: int ``[...]``, one token for each distribution.
        temperature: divides the logits; above 0.

    Returns:
        float32 ``[...]``, in nats; NaN for a token outside the vocabulary.
    """
    scaled = logits.astype(jnp.float32) / temperature
    nats = optax.softmax_cross_entropy_with_integer_labels(scaled, tokens)
    return jnp.where((tokens >= 0) & (tokens < logits.shape[-1]), nats, jnp.nan)


def weighted(values: Array, weights: Array) -> Array:
    """``values * weights``, and 0 where the weight is 0, whatever the value.

    A target of weight 0 may be any number, such as -100.
    """
    return jnp.where(weights == 0, 0.0, values) * weights


def map_logits(
    function: Callable[..., Any],
    params: Any,
    x: Float[Array, "B T d"],
    cfg: LMConfig,
    *operands: Array,
    block: int = BLOCK,
) -> Any:
    """``function(logits(params, x, cfg), *operands)`` by blocks of positions.

    Args:
        function: takes float32 logits ``[B, t, W]`` and the same positions of the
            operands, and returns a tree of arrays ``[B, t, ...]``; the results at a
            position must not depend on the others.
        params: the model's parameters.
        x: hidden states ``[B, T, d]`` from `hidden`.
        cfg: the model.
        operands: arrays ``[B, T, ...]``.
        block: the largest number of positions of each row in a block.

    Returns:
        The tree that `function` returns, with arrays ``[B, T, ...]``.

    Raises:
        ValueError: `block` is below 1.
    """
    if block < 1:
        raise ValueError(f"block={block} must be at least 1 position.")

    def apply(part):
        x, *operands = part
        return function(logits(params, x, cfg), *operands)

    T = x.shape[1]
    count = -(-T // block)
    if count <= 1:
        return apply((x, *operands))
    length = -(-T // count)

    # Interleaved, so that every block has positions of all devices.
    def split(a):
        a = jnp.pad(a, [(0, 0), (0, length * count - T)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(a.shape[0], length, count, *a.shape[2:]), 2, 0)

    def join(a):
        a = jnp.moveaxis(a, 0, 2)
        return a.reshape(a.shape[0], length * count, *a.shape[3:])[:, :T]

    parts = jax.tree.map(split, (x, *operands))
    return jax.tree.map(
        join, jax.lax.map(jax.checkpoint(apply, prevent_cse=False), parts)
    )


def next_token_nats(
    params: Any,
    x: Float[Array, "B T d"],
    targets: Int[Array, "B T"],
    cfg: LMConfig,
    *,
    temperature: float = 1.0,
    block: int = BLOCK,
) -> Float[Array, "B T"]:
    """``-log softmax(logits(x) / temperature)[target]``, by `map_logits`.

    Args:
        params: the model's parameters.
        x: hidden states ``[B, T, d]`` from `hidden`.
        targets: int ``[B, T]``, the token after each position.
        cfg: the model.
        temperature: divides the logits; above 0.
        block: the largest number of positions of each row whose logits exist at once.

    Returns:
        float32 ``[B, T]``, in nats.

    Raises:
        ValueError: `block` is below 1.
    """

    def nats(logits, targets):
        return token_nats(logits, targets, temperature)

    return map_logits(nats, params, x, cfg, targets, block=block)
