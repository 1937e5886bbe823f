"""Completions of prompts, and the log-probabilities of their tokens.

`sample` draws, one step a token; `log_probabilities` scores given tokens in one
parallel pass, with a gradient. Both first read the prompts in one parallel pass; all
completions of a prompt go on from its state, so it costs once and not once for each.
Both are pure functions of any parameters whose weights are `jaxlab.params` leaves, so a
population of low-rank members is one `jax.vmap`.

Dimension key: B prompts, P tokens of a prompt, N tokens of a completion, R rows, which
are B times the completions a prompt.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from jaxlab import models
from jaxlab.inference import SamplingParams, sample_token
from jaxlab.layers import segments
from jaxlab.models import LMConfig


@struct.dataclass
class Completions:
    """What followed the prompts.

    Attributes:
        tokens: int32 ``[R, N]``; behind the end of a row the stop token.
        log_probabilities: float32 ``[R, N]``, of the distribution drawn from, 0 behind
            the end.
        mask: float32 ``[R, N]``, 1 up to the first stop token, which it includes.
    """

    tokens: Int[Array, "R N"]
    log_probabilities: Float[Array, "R N"]
    mask: Float[Array, "R N"]


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
        ValueError: shapes that do not fit, or a setting out of its range.
    """
    _check_prompts(prompts, segment_ids)
    if samples < 1:
        raise ValueError(f"samples={samples}; ask for at least one a prompt.")
    how = SamplingParams(max_tokens=max_tokens, temperature=temperature)

    def draw(logits, key):
        tokens = sample_token(logits, key, how)
        if temperature == 0:
            return tokens, jnp.zeros(tokens.shape)
        return tokens, _log_probability(logits, tokens, temperature)

    def one(carry, key):
        tokens, state = carry
        logits, state = models.step(params, tokens, cfg, state)
        drawn = draw(logits, key)
        return (drawn[0], state), drawn

    logits, state = _read(params, prompts, segment_ids, cfg, max_tokens, samples)
    keys = jax.random.split(key, max_tokens)
    first = draw(logits, keys[0])
    _, rest = jax.lax.scan(one, (first[0], state), keys[1:])
    tokens, log_p = (
        jnp.concatenate([a[None], b]).T for a, b in zip(first, rest, strict=True)
    )
    if stop is None:
        return Completions(tokens, log_p, jnp.ones(tokens.shape))
    stops = (tokens == stop).astype(jnp.int32)
    lives = jnp.cumsum(stops, axis=1) == stops  # no stop before this token
    return Completions(
        jnp.where(lives, tokens, stop),
        jnp.where(lives, log_p, 0.0),
        lives.astype(jnp.float32),
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
        ValueError: shapes that do not fit, or a temperature of 0 or less.
    """
    _check_prompts(prompts, segment_ids)
    B, (R, N) = prompts.shape[0], tokens.shape
    if tokens.shape != mask.shape or R % B:
        raise ValueError(
            f"tokens {tokens.shape} and mask {mask.shape} must have one shape, with as "
            f"many rows for each of the prompts {prompts.shape}."
        )
    if not temperature > 0:
        raise ValueError(
            f"temperature={temperature}, but must be above 0: a greedy choice has no "
            "log-probability to learn from."
        )
    first, state = _read(params, prompts, segment_ids, cfg, N, R // B)
    logits = first[:, None]
    if N > 1:
        follows = jnp.where(mask > 0, 0, segments.PADDING)
        rest, _ = models.forward(
            params, tokens[:, :-1], cfg, state=state, segment_ids=follows[:, :-1]
        )
        logits = jnp.concatenate([logits, rest], axis=1)
    return jnp.where(mask > 0, _log_probability(logits, tokens, temperature), 0.0)


def _read(params, prompts, segment_ids, cfg: LMConfig, max_tokens: int, samples: int):
    """The logits ``[R, W]`` and the state behind each prompt, `samples` times each."""
    B, P = prompts.shape
    state = models.init_state(cfg, B, P + max_tokens)
    logits, state = models.forward(
        params, prompts, cfg, state=state, segment_ids=segment_ids
    )
    logits = jnp.repeat(logits[:, -1], samples, axis=0)
    state = jax.tree.map(lambda a: jnp.repeat(a, samples, axis=1), state)  # [L, B, ..]
    return logits, state


def _log_probability(logits, tokens, temperature: float):
    """float32, of one token for each distribution."""
    logits = logits.astype(jnp.float32) / temperature
    return -optax.softmax_cross_entropy_with_integer_labels(logits, tokens)


def _check_prompts(prompts, segment_ids) -> None:
    if prompts.ndim != 2 or prompts.shape[1] == 0 or segment_ids.shape != prompts.shape:
        raise ValueError(
            f"prompts {prompts.shape} and segment_ids {segment_ids.shape} must have "
            "one shape, [prompts, tokens], with at least one token (the separator "
            "starts a new document)."
        )
