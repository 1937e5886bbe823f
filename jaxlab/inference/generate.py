"""Continue a prompt: one parallel pass over it, then one step a token."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxlab import models
from jaxlab.inference.sampling import SamplingParams, sample_token
from jaxlab.models import LMConfig


def generate(
    params: Any, prompt: Int[Array, "B T"], cfg: LMConfig, how: SamplingParams
) -> Int[Array, "B max_tokens"]:
    """Tokens that follow `prompt`.

    Args:
        params: the model's parameters.
        prompt: int ``[B, T]`` with T at least 1.
        cfg: the model.
        how: how many tokens, and how they are drawn.

    Returns:
        int32 ``[B, max_tokens]``.

    Raises:
        ValueError: an empty prompt.
    """
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(
            f"The prompt has shape {prompt.shape}; give [batch, tokens] with at least "
            "one token (the tokenizer's separator starts a new document)."
        )
    return _generate(params, prompt, cfg, how)


@functools.partial(jax.jit, static_argnames=("cfg", "how"))
def _generate(params, prompt, cfg: LMConfig, how: SamplingParams):
    batch, length = prompt.shape
    state = models.init_state(cfg, batch, length + how.max_tokens)
    logits, state = models.forward(params, prompt, cfg, state=state)

    def one(carry, key):
        logits, state = carry
        tokens = sample_token(logits, key, how)
        return models.step(params, tokens, cfg, state), tokens

    keys = jax.random.split(jax.random.key(how.seed), how.max_tokens)
    _, tokens = jax.lax.scan(one, (logits[:, -1], state), keys)
    return jnp.swapaxes(tokens, 0, 1)
