"""Rewards of completions, and what evolution strategies maximise of a model.

A reward is a number a completion. The functions of parameters below give one number a
call, the greater the better, so `jax.vmap` over members gives the fitness of a
population.

Reference: pass@k, Chen et al., Evaluating Large Language Models Trained on Code, arXiv
2107.03374, equation 1.

Dimension key: R rows, Q questions, N tokens of a completion, A tokens of an answer.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from jaxlab.models import LMConfig
from jaxlab.rl.questions import Questions
from jaxlab.rl.rollout import log_probabilities, sample


def exact_match(
    tokens: Int[Array, "R N"],
    mask: Float[Array, "R N"],
    answers: Int[Array, "R A"],
    answer_mask: Float[Array, "R A"],
) -> Float[Array, " R"]:
    """1 where a completion begins with the whole answer, else 0.

    Args:
        tokens, mask: completions; what the mask leaves out equals nothing.
        answers, answer_mask: what is right; an answer that is longer than N is never
            matched.

    Raises:
        ValueError: shapes that do not fit.
    """
    if (
        tokens.shape != mask.shape
        or answers.shape != answer_mask.shape
        or tokens.shape[:1] != answers.shape[:1]
    ):
        raise ValueError(
            f"tokens {tokens.shape} and mask {mask.shape} must have one shape, answers "
            f"{answers.shape} and answer_mask {answer_mask.shape} another, with as "
            "many rows; repeat the questions where they have several completions."
        )
    A = answers.shape[1]
    width = ((0, 0), (0, max(A - tokens.shape[1], 0)))
    tokens, mask = jnp.pad(tokens, width)[:, :A], jnp.pad(mask, width)[:, :A]
    equal = (tokens == answers) & (mask > 0)
    return jnp.all(equal | (answer_mask == 0), axis=1).astype(jnp.float32)


def pass_at_k(successes: Num[Array, " Q"], n: int, k: int) -> Float[Array, " Q"]:
    """The chance that k of n samples hold a success, c of them being successes.

    1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n - c + 1}^n (1 - k / i), which is the
    unbiased estimate of 1 - (1 - p)^k for samples that succeed with chance p.

    Args:
        successes: c, for each question, from 0 to n.
        n: samples a question.
        k: how many of them may try.

    Raises:
        ValueError: k outside 1..n.
    """
    if not 1 <= k <= n:
        raise ValueError(
            f"pass@k with k={k} needs k from 1 to the {n} samples a question; draw "
            "more samples, or ask for a smaller k."
        )
    i = jnp.arange(1, n + 1, dtype=jnp.float32)[None]
    factor = jnp.maximum(i - k, 0.0) / i  # 0 at i = k, so those below do not matter
    counts = i > n - successes.astype(jnp.float32)[:, None]
    return 1 - jnp.prod(jnp.where(counts, factor, 1.0), axis=1)


def likelihood(params: Any, questions: Questions, cfg: LMConfig) -> Float[Array, ""]:
    """Mean over the questions of log p(answer | prompt), in nats; at most 0."""
    log_p = log_probabilities(
        params,
        questions.prompts,
        questions.segment_ids,
        questions.answers,
        questions.answer_mask,
        cfg,
    )
    return jnp.mean(jnp.sum(log_p, axis=1))


def exact_match_reward(
    params: Any,
    questions: Questions,
    key: Array,
    cfg: LMConfig,
    *,
    samples: int = 1,
    temperature: float = 0.0,
) -> Float[Array, ""]:
    """Share of completions that begin with the answer.

    Args:
        params: the model's parameters.
        questions: what is asked.
        key: of the draws; without effect at temperature 0.
        cfg: the model.
        samples: completions a question.
        temperature: 0 takes the likeliest tokens.
    """
    return jnp.mean(_successes(params, questions, key, cfg, samples, temperature))


def pass_at_k_reward(
    params: Any,
    questions: Questions,
    key: Array,
    cfg: LMConfig,
    *,
    samples: int,
    k: int,
    temperature: float = 1.0,
) -> Float[Array, ""]:
    """Mean over the questions of `pass_at_k`; arguments as `exact_match_reward`."""
    right = _successes(params, questions, key, cfg, samples, temperature)
    return jnp.mean(pass_at_k(jnp.sum(right, axis=1), samples, k))


def _successes(params, questions: Questions, key, cfg, samples, temperature):
    """``[Q, samples]``; a completion need not be longer than the longest answer."""
    drawn = sample(
        params,
        questions.prompts,
        questions.segment_ids,
        key,
        cfg,
        max_tokens=questions.answers.shape[1],
        temperature=temperature,
        samples=samples,
    )
    asked = questions.repeat(samples)
    right = exact_match(drawn.tokens, drawn.mask, asked.answers, asked.answer_mask)
    return right.reshape(-1, samples)
