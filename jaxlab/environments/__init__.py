"""Environments to act in, as pure functions: control problems, adapters, rollouts."""

from jaxlab.environments.acrobot import Acrobot
from jaxlab.environments.adapters import Brax, Gymnax
from jaxlab.environments.cartpole import CartPole
from jaxlab.environments.pendulum import Pendulum
from jaxlab.environments.rollout import (
    Box,
    Environment,
    Episode,
    Policy,
    Step,
    episode,
    returns,
)

__all__ = [
    "Acrobot",
    "Box",
    "Brax",
    "CartPole",
    "Environment",
    "Episode",
    "Gymnax",
    "Pendulum",
    "Policy",
    "Step",
    "episode",
    "returns",
]
