"""The decoding loop: one parallel pass over the prompts, then one step per token.

All completions of a prompt continue from its state, so each prompt is read once. The
weights may be any leaves of `jaxlab.params`, and the functions are pure, so decoding
with a population of low-rank members is one `jax.vmap`.

Dimension key: B prompts, P tokens of a prompt, N tokens of a completion, R rows (B
times the completions per prompt), W vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxlab import models
from jaxlab.decoding.checks import check_key, check_prompts, check_settings
from jaxlab.decoding.sampling import SamplingParams, adjusted_logits, sample_token
from jaxlab.models import LMConfig
from jaxlab.models.language_model import check_count


@struct.dataclass
class Completions:
    """Tokens that followed the prompts.

    Attributes:
        tokens: int32 ``[R, N]``; after the end of a row, the first of the stop tokens.
        log_probabilities: float32 ``[R, N]``, under the distribution drawn from; 0
            after the end of a row.
        mask: float32 ``[R, N]``, 1 up to and including the token that ends the row.
    """

    tokens: Int[Array, "R N"]
    log_probabilities: Float[Array, "R N"]
    mask: Float[Array, "R N"]


def decode(
    params: Any,
    prompts: Int[Array, "B P"],
    cfg: LMConfig,
    how: SamplingParams,
    key: Array,
    *,
    segment_ids: Int[Array, "B P"] | None = None,
    samples: int = 1,
    vocab_size: int | None = None,
) -> Completions:
    """Draw tokens y_t ~ softmax(logits(prompt, y_<t) / temperature), cut to `top_p`.

    The loop ends after `how.max_tokens` tokens, or once every row has drawn a stop
    token. It has no reverse-mode gradient; `jaxlab.rl.log_probabilities`, of given
    tokens, has one.

    Args:
        params: the model's parameters.
        prompts: int ``[B, P]`` token ids, the shorter ones padded on the left.
        cfg: the model.
        how: how many tokens, how they are drawn, and which end a row; its seed is not
            used.
        key: PRNG key of the draws.
        segment_ids: int ``[B, P]``, -1 for padding; a row's last token is real. None
            for prompts of one length.
        samples: completions per prompt; those of prompt b are the rows from
            ``b * samples`` on.
        vocab_size: only ids below it are drawn, such as the size of the tokenizer; None
            for the model's, which may be larger.

    Returns:
        The completions, `how.max_tokens` tokens per row.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the shapes do not fit; a prompt is empty, ends with padding or has
            an id outside the vocabulary (where it is known: not traced); or a setting
            is out of range.
    """
    check_settings(cfg, how, vocab_size)
    check_key(key)
    N = how.max_tokens
    stop = jnp.asarray(how.stop, jnp.int32)
    keys = jax.random.split(key, N)

    def draw(t, x, out: Completions, ended):
        """Draw token t from hidden states `x` for the rows that have not ended."""
        logits = models.logits(params, x, cfg)[:, :vocab_size]
        tokens = sample_token(logits, keys[t], how)
        log_p = -models.token_nats(adjusted_logits(logits, how), tokens)
        log_p = jnp.where(ended, 0.0, log_p)
        if how.stop:
            tokens = jnp.where(ended, stop[0], tokens)
        out = Completions(
            out.tokens.at[:, t].set(tokens),
            out.log_probabilities.at[:, t].set(log_p),
            out.mask.at[:, t].set(1.0 - ended.astype(jnp.float32)),
        )
        return out, ended | jnp.isin(tokens, stop)

    def unfinished(carry):
        t, _, ended, _ = carry
        return (t < N) & ~_all(ended) if how.stop else t < N

    def next_token(carry):
        t, out, ended, state = carry
        x, state = models.hidden_step(params, out.tokens[:, t - 1], cfg, state)
        out, ended = draw(t, x, out, ended)
        return t + 1, out, ended, state

    x, state = prefill(
        params,
        prompts,
        cfg,
        max_tokens=N,
        segment_ids=segment_ids,
        samples=samples,
    )
    rows = x.shape[0]
    blank = Completions(
        jnp.full((rows, N), how.stop[0] if how.stop else 0, jnp.int32),
        jnp.zeros((rows, N)),
        jnp.zeros((rows, N)),
    )
    out, ended = draw(0, x, blank, jnp.zeros(rows, bool))
    return jax.lax.while_loop(unfinished, next_token, (1, out, ended, state))[1]


def prefill(
    params: Any,
    prompts: Int[Array, "B P"],
    cfg: LMConfig,
    *,
    max_tokens: int,
    segment_ids: Int[Array, "B P"] | None = None,
    samples: int = 1,
) -> tuple[Float[Array, "R d"], Any]:
    """Read the prompts in one parallel pass, with a gradient.

    Args:
        params: the model's parameters.
        prompts: int ``[B, P]`` token ids, the shorter ones padded on the left.
        cfg: the model.
        max_tokens: how many tokens will follow; attention layers leave room for them.
        segment_ids: int ``[B, P]``, -1 for padding; a row's last token is real. None
            for prompts of one length.
        samples: rows per prompt; those of prompt b are the rows from ``b * samples``
            on.

    Returns:
        The hidden states ``[R, d]`` after each prompt, for `models.logits`, and the
        state of R rows.

    Raises:
        TypeError, ValueError: as `decode`.
    """
    check_prompts(prompts, cfg, segment_ids)
    check_count("max_tokens", max_tokens, least=0)
    check_count("samples", samples)
    B, P = prompts.shape
    state = models.init_state(cfg, B, P + max_tokens)
    x, state = models.hidden(params, prompts, cfg, state=state, segment_ids=segment_ids)
    x, state = jnp.repeat(x[:, -1], samples, axis=0), models.repeat_rows(state, samples)
    return x, state


@jax.custom_batching.custom_vmap
def _all(ended: Bool[Array, " R"]) -> Bool[Array, ""]:
    return jnp.all(ended)


@_all.def_vmap
def _all_of_batch(axis_size, in_batched, ended):
    """One condition for a whole batch of loops, so that they end together.

    With a condition for each, every iteration would copy the state, to keep that of the
    loops that have ended; here rows that have ended stay unchanged without it.
    """
    return _all(ended.reshape(-1)), False
