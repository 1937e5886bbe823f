"""Choosing tokens from logits."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn."""

    max_tokens: int = 256  # tokens to generate
    temperature: float = 0.8  # 0 takes the likeliest token
    top_p: float = 1.0  # keep the likeliest tokens that hold this probability
    seed: int = 0

    def __post_init__(self):
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}; ask for at least one.")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} is below 0.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is outside (0, 1].")


def sample_token(
    logits: Float[Array, "B W"], key: Array, how: SamplingParams
) -> Int[Array, " B"]:
    """Draw one token a row from ``softmax(logits / temperature)``, cut to `top_p`.

    Nucleus sampling keeps the smallest set of likeliest tokens whose probabilities add
    to at least `top_p` (Holtzman et al., arXiv 1904.09751).
    """
    if how.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / how.temperature
    if how.top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        threshold = jnp.min(
            jnp.where(before < how.top_p, descending, jnp.inf), axis=-1, keepdims=True
        )
        logits = jnp.where(logits >= threshold, logits, -jnp.inf)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
