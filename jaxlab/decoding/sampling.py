"""Drawing tokens from logits."""

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.models.language_model import check_count

# The relative error of a running sum of float32 probabilities.
ROUNDING = 2e-6


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Settings of the distribution that tokens are drawn from and of a row's end."""

    max_tokens: int = 256  # tokens to generate
    temperature: float = 0.8  # 0 takes the likeliest token
    top_p: float = 1.0  # draw from the likeliest tokens with this total probability
    seed: int = 0
    stop: tuple[int, ...] = ()  # tokens that end a row; if empty, only max_tokens does

    def __post_init__(self):
        check_count("max_tokens", self.max_tokens)
        if not _is_whole(self.seed):
            raise TypeError(f"seed={self.seed!r} must be a whole number.")
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real) or isinstance(value, bool):
                raise TypeError(f"{name}={value!r} must be a number.")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} is below 0.")
        if not math.isfinite(self.temperature):
            raise ValueError(
                f"temperature={self.temperature} is not a finite number; 0 takes the "
                "likeliest token, 1 draws from the model's distribution."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is outside (0, 1].")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} is outside 0 to 2**32 - 1.")
        if not isinstance(self.stop, tuple):
            raise TypeError(f"stop={self.stop!r} must be a tuple of token ids: (0,).")
        if not all(map(_is_whole, self.stop)):
            raise TypeError(f"stop={self.stop!r} must hold token ids, whole numbers.")
        if any(token < 0 for token in self.stop):
            raise ValueError(f"stop={self.stop} has an id below 0, which no token has.")


def _is_whole(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def adjusted_logits(
    logits: Float[Array, "B W"], how: SamplingParams
) -> Float[Array, "B W"]:
    """Logits of the distribution that tokens are drawn from.

    That is ``softmax(logits / temperature)``, cut to the nucleus: the smallest set of
    likeliest tokens whose probabilities add to at least `top_p` (Holtzman et al., arXiv
    1904.09751). Among equally likely tokens at its border, it keeps the lowest ids.

    Args:
        logits: ``[B, W]``.
        how: temperature and `top_p`; at temperature 0 the nucleus is the likeliest
            token.

    Returns:
        float32 ``[B, W]``, at most 0, and -inf for tokens outside the nucleus.
    """
    logits = logits.astype(jnp.float32)
    if how.temperature == 0:
        likeliest = jnp.argmax(logits, axis=-1, keepdims=True)
        ids = jnp.arange(logits.shape[-1])[None]
        return jnp.where(ids == likeliest, 0.0, -jnp.inf)
    # The maximum is subtracted first and the divisor is a normal float32, so that the
    # largest logit is 0 however low the temperature.
    logits -= jnp.max(logits, axis=-1, keepdims=True)
    logits /= max(how.temperature, float(jnp.finfo(jnp.float32).tiny))
    if how.top_p == 1:
        return logits
    descending = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    needed = before < how.top_p * (1 - ROUNDING)
    size = jnp.maximum(jnp.sum(needed, axis=-1, keepdims=True), 1)
    border = jnp.take_along_axis(descending, size - 1, axis=-1)
    above, at_border = logits > border, logits == border
    room = size - jnp.sum(above, axis=-1, keepdims=True)
    first = jnp.cumsum(at_border.astype(jnp.int32), axis=-1) <= room
    return jnp.where(above | (at_border & first), logits, -jnp.inf)


def sample_token(
    logits: Float[Array, "B W"], key: Array, how: SamplingParams
) -> Int[Array, " B"]:
    """Draw one token per row from the distribution of `adjusted_logits`.

    Args:
        logits: ``[B, W]``.
        key: PRNG key of the draws; not used at temperature 0.
        how: temperature and `top_p`.

    Returns:
        int32 ``[B]``.
    """
    if how.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    drawn = jax.random.categorical(key, adjusted_logits(logits, how), axis=-1)
    return drawn.astype(jnp.int32)
