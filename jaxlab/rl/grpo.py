"""GRPO: group relative policy optimization.

Every question q is answered G times by the policy pi_old, and an answer's advantage is
how its reward compares with those of its group,

    A_i = (r_i - mean(r)) / std(r),

so no critic is learned. With rho_it = pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t) the
policy maximises

    1/G sum_i 1/|o_i| sum_t  min(rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i)
                             - beta D_it
    D_it = pi_ref / pi - log(pi_ref / pi) - 1.

`advantages`, `clipped`, `k3` and `token_sum` are the four parts, `PolicyGradient` the
objective that they make, and `GRPO.build` makes a learner of it, with `init` and
`step`.

Differs from the paper in: pi_ref stays what `init` was given; 1e-6 is added to the
deviation, and a group of equal rewards has advantage 0; beta is 0 unless it is set. The
losses that mixers add in training, such as the balance of a router, are left out.

Later variants: `scale="none", average="constant"` is Dr. GRPO; `clip_above=0.28,
average="token"` are two parts of DAPO, whose sampling and length penalty are not here.

References: Shao et al., DeepSeekMath, arXiv 2402.03300, equations 3 and 4; Liu et al.,
Understanding R1-Zero-Like Training (Dr. GRPO), arXiv 2503.20783; Yu et al., DAPO, arXiv
2503.14476.

Dimension key: Q questions, G answers a question, R = Q G rows, N tokens of an answer.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float

from jaxlab import models
from jaxlab.evolution.shaping import finite
from jaxlab.models import LMConfig
from jaxlab.objectives import Ratio, gradient_step
from jaxlab.rl.questions import Questions
from jaxlab.rl.rewards import exact_match
from jaxlab.rl.rollout import log_probabilities, sample

EPSILON = 1e-6  # of a deviation

SCALES = ("deviation", "none")
AVERAGES = ("sequence", "token", "constant")

Reward = Callable[..., Float[Array, " R"]]
"""(tokens, mask, answers, answer_mask) to a number a completion."""


@dataclasses.dataclass(frozen=True)
class GRPO:
    """Settings of the method."""

    group: int = 8  # G, answers a question
    max_tokens: int | None = None  # of an answer; None: as the longest right one
    stop: int | None = None  # the token that ends an answer
    temperature: float = 1.0  # of the policy, in drawing and in learning
    clip: float = 0.2  # eps: a ratio below 1 - eps is of no more use
    clip_above: float | None = None  # one above 1 + this; None: the same eps
    kl: float = 0.0  # beta, what a nat away from the reference costs
    scale: str = "deviation"  # what divides advantages: the group's, or "none"
    average: str = "sequence"  # over tokens, see `token_average`
    updates: int = 1  # gradient steps a batch of answers

    def __post_init__(self):
        if self.group < 2:
            raise ValueError(
                f"group={self.group}, but must be at least 2: an answer by itself has "
                "nothing to be compared with."
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1.")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature}, but must be above 0: greedy answers "
                "to one question are all the same."
            )
        if not 0 < self.clip <= 1:
            raise ValueError(f"clip={self.clip} is outside (0, 1].")
        if not self.above > 0:
            raise ValueError(f"clip_above={self.clip_above} must be above 0, or None.")
        if self.kl < 0:
            raise ValueError(f"kl={self.kl} is below 0, a reward for moving away.")
        if self.updates < 1:
            raise ValueError(f"updates={self.updates} must be at least 1.")
        _check_choice("scale", self.scale, SCALES)
        _check_choice("average", self.average, AVERAGES)

    @property
    def above(self) -> float:
        return self.clip if self.clip_above is None else self.clip_above

    def build(
        self,
        model: LMConfig,
        optimizer: optax.GradientTransformation,
        reward: Reward = exact_match,
        *,
        accumulate: int = 1,
        tapped: Any = None,
        trainable: Any = None,
    ) -> "Learner":
        """The learner of a model by an optax optimizer, which minimises.

        Args:
            model: the model.
            optimizer: of the loss.
            reward: of the answers; see `Reward`.
            accumulate: parts of the questions whose gradients are computed one by one.
            tapped: tree of booleans, the weights whose statistics the optimizer takes,
                as MKOR does; None for none.
            trainable: tree of booleans, the parameters that are learned; None: all.
        """
        return Learner(
            self,
            model,
            optimizer,
            reward,
            accumulate,
            tapped=_leaves(tapped),
            trainable=_leaves(trainable),
        )


def informative(rewards: Float[Array, "Q G"]) -> Bool[Array, " Q"]:
    """Whether a group has two answers of different reward."""
    return jnp.max(rewards, axis=1) > jnp.min(rewards, axis=1)


def advantages(
    rewards: Float[Array, "Q G"], scale: str = "deviation"
) -> Float[Array, "Q G"]:
    """(r - mean) / (std + 1e-6) over each group; 0 in a group of equal rewards.

    A reward that is not finite counts as the worst finite one of all.

    Args:
        rewards: of the G answers to each question.
        scale: "deviation"; or "none" for r - mean, whose policy gradient is (G - 1) / G
            times that of the expected reward.

    Raises:
        ValueError: rewards of another shape, groups below 2, an unknown scale.
    """
    _check_choice("scale", scale, SCALES)
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards have shape {rewards.shape}, but must be [questions, group] with "
            "groups of at least 2."
        )
    rewards = finite(rewards.astype(jnp.float32))
    centred = rewards - jnp.mean(rewards, axis=1, keepdims=True)
    if scale == "deviation":
        centred /= jnp.std(rewards, axis=1, keepdims=True) + EPSILON
    return jnp.where(informative(rewards)[:, None], centred, 0.0)


def clipped(
    log_ratio: Float[Array, "R N"],
    advantages: Float[Array, "R N"],
    below: float,
    above: float,
) -> tuple[Float[Array, "R N"], Bool[Array, "R N"]]:
    """min(rho A, clip(rho, 1 - below, 1 + above) A), and where the bound is taken.

    There the gradient is 0 even if rho = exp(log_ratio) overflows.
    """
    gains = advantages > 0
    past = jnp.where(
        gains, log_ratio > jnp.log1p(above), log_ratio < jnp.log1p(-below)
    ) & (advantages != 0)
    free = jnp.exp(jnp.where(past, 0.0, log_ratio)) * advantages
    bound = jnp.where(gains, 1 + above, 1 - below) * advantages
    return jnp.where(past, bound, free), past


def k3(log_p: Float[Array, "R N"], log_q: Float[Array, "R N"]) -> Float[Array, "R N"]:
    """q/p - log(q/p) - 1, never negative; over samples of p its mean is KL(p || q).

    Reference: Schulman 2020, Approximating KL Divergence.
    """
    return jnp.expm1(log_q - log_p) - (log_q - log_p)


def token_sum(
    values: Float[Array, "R N"], mask: Float[Array, "R N"], average: str
) -> Ratio:
    """A sum over all tokens that the mask keeps, and what makes an average of it.

    Args:
        values: of tokens; what the mask leaves out may be anything.
        mask: 1 or 0.
        average: "sequence", the mean over rows of the mean over a row's tokens (the
            paper); "token", the mean over all tokens (DAPO); "constant", the sum over
            tokens divided by R N, whatever their number (Dr. GRPO).
    """
    _check_choice("average", average, AVERAGES)
    R, N = mask.shape
    values = jnp.where(mask > 0, values, 0.0)
    match average:
        case "sequence":
            lengths = jnp.maximum(jnp.sum(mask, axis=1), 1.0)
            return Ratio(jnp.sum(jnp.sum(values, axis=1) / lengths), jnp.float32(R))
        case "token":
            return Ratio(jnp.sum(values), jnp.sum(mask))
        case _:
            return Ratio(jnp.sum(values), jnp.float32(R * N))


def token_average(
    values: Float[Array, "R N"], mask: Float[Array, "R N"], average: str
) -> Float[Array, ""]:
    """The mean of `token_sum`; 0 where no token is kept."""
    return token_sum(values, mask, average).mean


def policy_sums(
    new: Float[Array, "R N"],
    old: Float[Array, "R N"],
    advantages: Float[Array, " R"],
    mask: Float[Array, "R N"],
    *,
    below: float = 0.2,
    above: float = 0.2,
    average: str = "sequence",
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Ratio]]:
    """-sum(min(rho A, clip(rho, 1 - below, 1 + above) A)), rho = exp(new - old).

    Args:
        new: log-probabilities of the answers' tokens, of the policy that learns.
        old: of the policy that drew them; a constant.
        advantages: of the answers.
        mask: 1 for the tokens of an answer, 0 behind its end.
        below, above: how far a ratio may go to either side of 1 for a gain.
        average: see `token_sum`.

    Returns:
        The sum and its weight, whose quotient is the loss; and of all tokens alike
        ``clipped``, the share whose gradient the bound stops, and ``kl_to_old``, the
        `k3` estimate of KL(old || new).

    Raises:
        ValueError: shapes that do not fit, an unknown average.
    """
    if not new.shape == old.shape == mask.shape or advantages.shape != new.shape[:1]:
        raise ValueError(
            f"new {new.shape}, old {old.shape} and mask {mask.shape} must have one "
            f"shape, [answers, tokens], and advantages {advantages.shape} one number "
            "an answer."
        )
    old = jax.lax.stop_gradient(old)
    # What is masked may be anything, NaN as well: it must not meet the gradient.
    log_ratio = jnp.where(mask > 0, new - old, 0.0)
    gain, at_bound = clipped(log_ratio, advantages[:, None], below, above)
    total, weight = token_sum(gain, mask, average)
    figures = {
        "clipped": token_sum(at_bound.astype(jnp.float32), mask, "token"),
        "kl_to_old": token_sum(k3(jnp.zeros_like(new), log_ratio), mask, "token"),
    }
    return -total, weight, figures


def policy_loss(
    new: Float[Array, "R N"],
    old: Float[Array, "R N"],
    advantages: Float[Array, " R"],
    mask: Float[Array, "R N"],
    *,
    below: float = 0.2,
    above: float = 0.2,
    average: str = "sequence",
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The means of `policy_sums`: the loss, and its figures."""
    total, weight, figures = policy_sums(
        new, old, advantages, mask, below=below, above=above, average=average
    )
    means = {name: figure.mean for name, figure in figures.items()}
    return Ratio(total, weight).mean, means


@dataclasses.dataclass(frozen=True)
class PolicyGradient:
    """The objective of GRPO: answers that were drawn, and their advantages.

    A batch has, a row a question, ``prompts`` and ``segment_ids`` (int ``[Q, P]``),
    ``tokens`` (int) and ``mask`` (float) ``[Q, G, N]`` of the answers, ``advantages``
    ``[Q, G]``, ``old``, their log-probabilities by the policy that drew them
    ``[Q, G, N]``, ``first`` (bool ``[Q]``), whether that is the policy itself, and for
    a term of pi_ref its log-probabilities ``reference``.
    """

    model: LMConfig
    settings: GRPO

    def spec(self) -> Any:
        """The model's parameters."""
        return models.spec(self.model)

    def loss(self, params: Any, batch: Any, key: Array | None = None):
        """(total, weight, figures), see `jaxlab.objectives`; no key is used."""
        del key
        how = self.settings

        def rows(x):
            return x.reshape(-1, *x.shape[2:])

        mask = rows(batch["mask"])
        new = log_probabilities(
            params,
            batch["prompts"],
            batch["segment_ids"],
            rows(batch["tokens"]),
            mask,
            self.model,
            how.temperature,
        )
        # The same pass for both, so that a ratio of one policy is exactly 1.
        first = jnp.repeat(batch["first"], how.group)[:, None]
        old = jnp.where(first, jax.lax.stop_gradient(new), rows(batch["old"]))
        total, weight, figures = policy_sums(
            new,
            old,
            rows(batch["advantages"]),
            mask,
            below=how.clip,
            above=how.above,
            average=how.average,
        )
        if "reference" in batch:
            # As above: k3 may overflow where nothing is read.
            away = jnp.where(mask > 0, rows(batch["reference"]) - new, 0.0)
            away = k3(jnp.zeros_like(new), away)
            total += how.kl * token_sum(away, mask, how.average).total
            figures["kl_to_reference"] = token_sum(away, mask, "token")
        return total, weight, figures


@struct.dataclass
class State:
    """The memory of a learner.

    Attributes:
        optimizer: the state of the optax transformation.
        reference: the parameters of pi_ref; None where `kl` is 0.
    """

    optimizer: Any
    reference: Any = None


@dataclasses.dataclass(frozen=True)
class Learner:
    """`init` and `step`: pure functions of a state."""

    settings: GRPO
    model: LMConfig
    optimizer: optax.GradientTransformation
    reward: Reward
    accumulate: int = 1
    tapped: tuple[bool, ...] | None = None  # the leaves of the tree
    trainable: tuple[bool, ...] | None = None  # likewise

    def init(self, params: Any) -> State:
        """The state before the first step; `params` become the reference."""
        reference = params if self.settings.kl else None
        return State(self.optimizer.init(params), reference)

    @functools.partial(jax.jit, static_argnames="self")
    def step(
        self, state: State, params: Any, questions: Questions, key: Array
    ) -> tuple[State, Any, dict[str, Array]]:
        """Draw G answers to each question, reward them, and learn from them.

        Args:
            state: from `init` or an earlier step.
            params: the model's parameters.
            questions: Q of them.
            key: of the draws.

        Returns:
            The next state and parameters, and figures: ``reward``, the mean of the
            finite ones; ``not_finite``, the number of the others, see `advantages`;
            ``no_signal``, the share of groups of equal rewards; ``entropy``, minus the
            mean log-probability of the tokens drawn (nats); ``length``, mean tokens of
            an answer; and as means over the updates the metrics of `gradient_step`,
            ``clipped`` and ``kl_to_old`` (both 0 at the first), and with `kl` set
            ``kl_to_reference``.
        """
        how = self.settings
        drawn = sample(
            params,
            questions.prompts,
            questions.segment_ids,
            key,
            self.model,
            max_tokens=how.max_tokens or questions.answers.shape[1],
            temperature=how.temperature,
            stop=how.stop,
            samples=how.group,
        )
        asked = questions.repeat(how.group)
        reward_R = self.reward(
            drawn.tokens, drawn.mask, asked.answers, asked.answer_mask
        )
        given = jnp.isfinite(reward_R)
        reward_QG = finite(reward_R).reshape(-1, how.group)

        def by_question(x):
            return x.reshape(-1, how.group, *x.shape[1:])

        def log_p(params):
            return by_question(
                log_probabilities(
                    params,
                    questions.prompts,
                    questions.segment_ids,
                    drawn.tokens,
                    drawn.mask,
                    self.model,
                    how.temperature,
                )
            )

        objective = PolicyGradient(self.model, how)
        batch = {
            "prompts": questions.prompts,
            "segment_ids": questions.segment_ids,
            "tokens": by_question(drawn.tokens),
            "mask": by_question(drawn.mask),
            "advantages": advantages(reward_QG, how.scale),
            # Only updates after the first read it.
            "old": log_p(params)
            if how.updates > 1
            else by_question(drawn.log_probabilities),
        }
        if how.kl:
            batch["reference"] = log_p(state.reference)
        structure = jax.tree.structure(objective.spec())

        def tree(leaves):
            return None if leaves is None else structure.unflatten(leaves)

        def update(carry, number):
            params, opt_state = carry
            first = jnp.full(reward_QG.shape[:1], number == 0)
            params, opt_state, figures = gradient_step(
                objective,
                self.optimizer,
                params,
                opt_state,
                batch | {"first": first},
                key,
                accumulate=self.accumulate,
                tapped=tree(self.tapped),
                trainable=tree(self.trainable),
            )
            return (params, opt_state), figures

        (params, opt_state), found = jax.lax.scan(
            update, (params, state.optimizer), jnp.arange(how.updates)
        )
        figures = jax.tree.map(jnp.mean, found) | {
            "reward": jnp.mean(reward_R, where=given),
            "not_finite": jnp.sum(~given),
            "no_signal": jnp.mean(~informative(reward_QG), dtype=jnp.float32),
            "entropy": -token_average(drawn.log_probabilities, drawn.mask, "token"),
            "length": jnp.mean(jnp.sum(drawn.mask, axis=1)),
        }
        return State(opt_state, state.reference), params, figures


def _leaves(tree: Any) -> tuple[bool, ...] | None:
    """A tree of booleans as something that can be hashed."""
    return None if tree is None else tuple(jax.tree.leaves(tree))


def _check_choice(name: str, choice: str, known: tuple[str, ...]) -> None:
    if choice not in known:
        raise ValueError(f"{name}={choice!r}, but must be one of {known}.")
