"""Reinforcement learning of language models: questions, rollouts, rewards, methods."""

from jaxlab.rl.grpo import GRPO, Learner, State, advantages, k3, policy_loss
from jaxlab.rl.questions import Copy, Questions, Sums, Task, ask
from jaxlab.rl.rewards import (
    exact_match,
    exact_match_reward,
    likelihood,
    pass_at_k,
    pass_at_k_reward,
)
from jaxlab.rl.rollout import Completions, log_probabilities, sample

__all__ = [
    "GRPO",
    "Completions",
    "Copy",
    "Learner",
    "Questions",
    "State",
    "Sums",
    "Task",
    "advantages",
    "ask",
    "exact_match",
    "exact_match_reward",
    "k3",
    "likelihood",
    "log_probabilities",
    "pass_at_k",
    "pass_at_k_reward",
    "policy_loss",
    "sample",
]
