"""Completions of prompts, and the log-probabilities of their tokens.

`sample` draws, one step a token, by `jaxlab.decoding`; `log_probabilities` scores given
tokens in one parallel pass, with a gradient. Both first read the prompts in one
parallel pass; all completions of a prompt go on from its state, so it costs once and
not once for each. Both are pure functions of any parameters whose weights are
`jaxlab.params` leaves, so a population of low-rank members is one `jax.vmap`.

Dimension key: B prompts, P tokens of a prompt, N tokens of a completion, R rows, which
are B times the completions a prompt.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab import models
from jaxlab.decoding import Completions, SamplingParams, decode, prefill
from jaxlab.decoding.checks import check_prompts
from jaxlab.layers import segments
from jaxlab.models import LMConfig
from jaxlab.models.language_model import check_tokens
from pallas_kernels.arguments import known


def sample(
    params: Any,
    prompts: Int[Array, "B P"],
    segment_ids: Int[Array, "B P"],
    key: Array,
    cfg: LMConfig,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    stop: int | None = None,
    samples: int = 1,
) -> Completions:
    """Draw tokens y_t ~ softmax(logits(prompt, y_<t) / temperature).

    Args:
        params: the model's parameters.
        prompts: token ids, padded on the left.
        segment_ids: -1 for padding; a row's last token is real.
        key: of the draws.
        cfg: the model.
        max_tokens: N.
        temperature: 0 takes the likeliest token, whose log-probability is then 0.
        stop: the token that ends a row; None for rows of N tokens.
        samples: completions a prompt, which share its pass; those of prompt b are the
            rows from ``b * samples`` on.

    Raises:
        TypeError, ValueError: as `jaxlab.decoding.decode`.
    """
    how = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        stop=() if stop is None else (stop,),
    )
    return decode(
        params, prompts, cfg, how, key, segment_ids=segment_ids, samples=samples
    )


def log_probabilities(
    params: Any,
    prompts: Int[Array, "B P"],
    segment_ids: Int[Array, "B P"],
    tokens: Int[Array, "R N"],
    mask: Float[Array, "R N"],
    cfg: LMConfig,
    temperature: float = 1.0,
) -> Float[Array, "R N"]:
    """log softmax(logits(prompt, y_<t) / temperature)[y_t], without a loop over t.

    Args:
        params: the model's parameters.
        prompts: token ids, padded on the left.
        segment_ids: -1 for padding; a row's last token is real.
        tokens: y; those of prompt b are the R / B rows from ``b R / B`` on.
        mask: 1 for the tokens of a completion, 0 behind its end.
        cfg: the model.
        temperature: of the distribution, above 0.

    Returns:
        float32, 0 where the mask is.

    Raises:
        TypeError: tokens that are no integers, or arguments that are no arrays.
        ValueError: shapes that do not fit, an id outside the vocabulary (where it is
            known: not traced), or a temperature that is not above 0 and finite.
    """
    check_prompts(prompts, cfg, segment_ids)
    _check_completions(tokens, mask, cfg, prompts)
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature={temperature}, but must be above 0 and finite: a greedy "
            "choice has no log-probability to learn from."
        )
    B, (R, N) = prompts.shape[0], tokens.shape
    first, state = prefill(
        params,
        prompts,
        cfg,
        max_tokens=N,
        segment_ids=segment_ids,
        samples=R // B,
    )
    x = first[:, None]
    if N > 1:
        follows = jnp.where(mask > 0, 0, segments.PADDING)
        rest, _ = models.hidden(
            params, tokens[:, :-1], cfg, state=state, segment_ids=follows[:, :-1]
        )
        x = jnp.concatenate([x, rest], axis=1)
    nats = models.next_token_nats(params, x, tokens, cfg, temperature=temperature)
    return jnp.where(mask > 0, -nats, 0.0)


def _check_completions(tokens: Any, mask: Any, cfg: LMConfig, prompts: Any) -> None:
    """Check the completions of prompts; their ids only where the mask is known."""
    if not isinstance(mask, jax.Array | np.ndarray):
        raise TypeError(f"mask is of type {type(mask).__name__}, but must be an array.")
    kept = known(mask)
    behind = mask if kept is None else np.where(kept > 0, 0, segments.PADDING)
    check_tokens(tokens, cfg, axes=("rows", "tokens"), segment_ids=behind)
    (B, _), R = prompts.shape, tokens.shape[0]
    if tokens.shape != mask.shape or R % B or not R:
        raise ValueError(
            f"tokens {tokens.shape} and mask {mask.shape} must have one shape, with as "
            f"many rows for each of the prompts {prompts.shape}."
        )
