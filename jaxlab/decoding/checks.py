"""Checks of what decoding is given, as far as it is known before the program runs."""

from typing import Any

import jax
import numpy as np

from jaxlab.decoding.sampling import SamplingParams
from jaxlab.models import LMConfig
from jaxlab.models.language_model import check_count, check_tokens
from pallas_kernels.arguments import known


def check_prompts(prompts: Any, cfg: LMConfig, segment_ids: Any = None) -> None:
    """Refuse prompts that the model cannot read, or that end with padding.

    Raises:
        TypeError: prompts or segment ids are no array of integers.
        ValueError: the shapes do not fit, an id is outside the vocabulary, or a prompt
            is empty or ends with padding.
    """
    check_tokens(
        prompts,
        cfg,
        axes=("prompts", "tokens"),
        name="prompts",
        segment_ids=segment_ids,
    )
    if 0 in prompts.shape:
        raise ValueError(
            f"The prompts have shape {prompts.shape}; give [prompts, tokens] with at "
            "least one token, such as the tokenizer's separator to start a document."
        )
    if segment_ids is None:
        return
    if not isinstance(segment_ids, jax.Array | np.ndarray):
        raise TypeError(
            f"segment_ids is of type {type(segment_ids).__name__}, but must be an "
            "array of integers [prompts, tokens]."
        )
    if segment_ids.shape != prompts.shape:
        raise ValueError(
            f"prompts {prompts.shape} and segment_ids {segment_ids.shape} must have "
            "one shape, [prompts, tokens]."
        )
    segments = known(segment_ids)
    if segments is not None and (segments[:, -1] < 0).any():
        raise ValueError(
            f"Prompt {np.argmax(segments[:, -1] < 0)} ends with padding, behind which "
            "nothing can follow; pad prompts on the left, and give each a token."
        )


def check_settings(cfg: LMConfig, how: Any, vocab_size: Any = None) -> None:
    """Refuse settings of another kind, and ids that are never drawn.

    Raises:
        TypeError: `how` or `vocab_size` is of another type.
        ValueError: `vocab_size` is outside the model's, or a stop token outside of it.
    """
    if not isinstance(how, SamplingParams):
        raise TypeError(
            f"how is of type {type(how).__name__}, but must be SamplingParams, such as "
            "SamplingParams(max_tokens=100)."
        )
    if vocab_size is None:
        vocab_size = cfg.vocab_size
    check_count("vocab_size", vocab_size)
    if vocab_size > cfg.vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} is above the model's {cfg.vocab_size}, which has "
            "no logits for more; None draws all its ids."
        )
    never = [token for token in how.stop if token >= vocab_size]
    if never:
        raise ValueError(
            f"stop={how.stop} has the id {never[0]}, but only the ids 0 to "
            f"{vocab_size - 1} are drawn, so it would end no row; leave it out."
        )


def check_key(key: Any) -> None:
    """Refuse a key that is no array, such as a seed.

    Raises:
        TypeError: names its type.
    """
    if not isinstance(key, jax.Array | np.ndarray):
        raise TypeError(
            f"key is of type {type(key).__name__}, but must be a PRNG key, such as "
            "jax.random.key(0)."
        )
