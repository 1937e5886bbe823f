"""Continuing a prompt, in one compiled program."""

import dataclasses
import functools
from typing import Any

import jax
from jaxtyping import Array, Int

from jaxlab.decoding import SamplingParams, decode
from jaxlab.decoding.checks import check_prompts, check_settings
from jaxlab.models import LMConfig


def generate(
    params: Any,
    prompt: Int[Array, "B T"],
    cfg: LMConfig,
    how: SamplingParams,
    *,
    vocab_size: int | None = None,
) -> Int[Array, "B max_tokens"]:
    """Draw the tokens that follow `prompt`.

    Args:
        params: the model's parameters.
        prompt: int ``[B, T]`` with T at least 1.
        cfg: the model.
        how: how many tokens, how they are drawn, and which end a row.
        vocab_size: only ids below it are drawn, such as the size of the tokenizer; None
            for the model's, which may be larger.

    Returns:
        int32 ``[B, max_tokens]``; after the end of a row, the first stop token.

    Raises:
        TypeError, ValueError: as `decode`; also an id of the prompt that is outside the
            vocabulary.
    """
    check_settings(cfg, how, vocab_size)
    check_prompts(prompt, cfg)
    key = jax.random.key(how.seed)
    how = dataclasses.replace(how, seed=0)  # a new seed needs no new compilation
    return _generate(params, prompt, key, cfg, how, vocab_size)


@functools.partial(jax.jit, static_argnames=("cfg", "how", "vocab_size"))
def _generate(params, prompt, key, cfg: LMConfig, how: SamplingParams, vocab_size):
    return decode(params, prompt, cfg, how, key, vocab_size=vocab_size).tokens
