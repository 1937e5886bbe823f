"""Continue a prompt, as one compiled program."""

import dataclasses
import functools
from typing import Any

import jax
from jaxtyping import Array, Int

from jaxlab.decoding import SamplingParams, decode
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
        how: how many tokens, how they are drawn, and which end a row.
        vocab_size: the tokenizer's ids, which are all that is drawn from; None takes
            the model's, which may be more.

    Returns:
        int32 ``[B, max_tokens]``; behind the end of a row the first stop token.

    Raises:
        ValueError: an empty prompt.
    """
    key = jax.random.key(how.seed)
    how = dataclasses.replace(how, seed=0)  # another seed is no other program
    return _generate(params, prompt, key, cfg, how, vocab_size)


@functools.partial(jax.jit, static_argnames=("cfg", "how", "vocab_size"))
def _generate(params, prompt, key, cfg: LMConfig, how: SamplingParams, vocab_size):
    return decode(params, prompt, cfg, how, key, vocab_size=vocab_size).tokens
