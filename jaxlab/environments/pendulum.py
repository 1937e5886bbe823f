"""Pendulum: swing a rod up with a torque too weak to lift it, and hold it there.

With theta the angle from upright, and the uniform rod's moment of inertia m l^2 / 3,

    theta'' = 3 g / (2 l) sin(theta) + 3 / (m l^2) u.

The speed is advanced and clipped first, then the angle advances by the new speed
(semi-implicit Euler). The reward is -(angle^2 + 0.1 theta'^2 + 0.001 u^2) in the state
before the step, with the angle in [-pi, pi]. The task never ends by itself. Constants
are those of Gymnasium's Pendulum-v1.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.environments.rollout import Box, Step, angle


@dataclasses.dataclass(frozen=True)
class Pendulum:
    """Constants, in kilograms, metres, seconds and radians.

    Attributes:
        gravity: g.
        mass: m.
        length: l.
        max_torque: largest absolute value of u.
        max_speed: largest absolute value of theta'.
        dt: seconds per step.
        max_steps: largest number of steps in an episode.
    """

    gravity: float = 10.0
    mass: float = 1.0
    length: float = 1.0
    max_torque: float = 2.0
    max_speed: float = 8.0
    dt: float = 0.05
    max_steps: int = 200

    def __post_init__(self):
        for name in ("mass", "length", "max_torque", "max_speed", "dt", "max_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but must be above 0."
                )

    @property
    def observation_size(self) -> int:
        """[cos theta, sin theta, theta']."""
        return 3

    @property
    def actions(self) -> Box:
        """The torque; `step` clips values outside these bounds."""
        return Box((-self.max_torque,), (self.max_torque,))

    def reset(self, key: Array) -> tuple[Float[Array, "2"], Float[Array, "3"]]:
        """A first state [theta, theta'] with any angle and a speed in [-1, 1]."""
        limits = jnp.asarray([math.pi, 1.0])
        state = jax.random.uniform(key, (2,), minval=-limits, maxval=limits)
        return state, _observe(state)

    def step(
        self, state: Float[Array, "2"], action: Float[Array, "1"], key: Array
    ) -> Step:
        """Apply the torque for `dt`."""
        theta, speed = state
        (u,) = jnp.clip(action, -self.max_torque, self.max_torque)
        reward = -(angle(theta) ** 2 + 0.1 * speed**2 + 0.001 * u**2)
        gravity = 1.5 * self.gravity / self.length * jnp.sin(theta)
        speed = speed + self.dt * (gravity + 3 / (self.mass * self.length**2) * u)
        speed = jnp.clip(speed, -self.max_speed, self.max_speed)
        state = jnp.stack([theta + self.dt * speed, speed])
        return Step(state, _observe(state), reward, jnp.zeros((), bool))


def _observe(state: Float[Array, "2"]) -> Float[Array, "3"]:
    theta, speed = state
    return jnp.stack([jnp.cos(theta), jnp.sin(theta), speed])
