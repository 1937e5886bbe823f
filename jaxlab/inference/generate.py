"""Continue a prompt: one parallel pass over it, then one step a token."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxlab import models
from jaxlab.inference.sampling import SamplingParams, sample_token
from jaxlab.models import LMConfig


def generate(
    params: Any,
    prompt: Int[Array, "B T"],
    cfg: LMConfig,
    how: SamplingParams,
    *,
    vocab_size: int | None = None,
) -> Int[Array, "B max_tokens"]:
    """Tokens that follow `prompt`.

    Args:
        params: the model's parameters.
        prompt: int ``[B, T]`` with T at least 1.
        cfg: the model.
        how: how many tokens, and how they are drawn.
        vocab_size: the tokenizer's ids, which are all that is drawn from; None takes
            the model's, which may be more.

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
    key = jax.random.key(how.seed)
    how = dataclasses.replace(how, seed=0)  # another seed is no other program
    return _generate(params, prompt, key, cfg, how, vocab_size or cfg.vocab_size)


@functools.partial(jax.jit, static_argnames=("cfg", "how", "vocab_size"))
def _generate(params, prompt, key, cfg: LMConfig, how: SamplingParams, vocab_size):
    batch, length = prompt.shape
    state = models.init_state(cfg, batch, length + how.max_tokens)
    logits, state = models.forward(params, prompt, cfg, state=state)

    def one(carry, key):
        logits, state = carry
        tokens = sample_token(logits[:, :vocab_size], key, how)
        return models.step(params, tokens, cfg, state), tokens

    keys = jax.random.split(key, how.max_tokens)
    _, tokens = jax.lax.scan(one, (logits[:, -1], state), keys)
    return jnp.swapaxes(tokens, 0, 1)
