"""Acrobot: swing the tip of two links above a bar by a torque at their common joint.

With theta_1 the first link's angle from hanging down and theta_2 the second's from the
first, the equations of motion are

    d_1 theta_1'' + d_2 theta_2'' + phi_1 = 0
    d_2 theta_1'' + d_3 theta_2'' + m_2 l_1 c_2 theta_1'^2 sin(theta_2) + phi_2 = u

where c_i is the distance of a link's centre from its joint, I_i its moment of inertia,

    d_1 = m_1 c_1^2 + m_2 (l_1^2 + c_2^2 + 2 l_1 c_2 cos theta_2) + I_1 + I_2
    d_2 = m_2 (c_2^2 + l_1 c_2 cos theta_2) + I_2,  d_3 = m_2 c_2^2 + I_2
    phi_1 = -m_2 l_1 c_2 (theta_2'^2 + 2 theta_1' theta_2') sin theta_2
            + (m_1 c_1 + m_2 l_1) g sin theta_1 + phi_2
    phi_2 = m_2 c_2 g sin(theta_1 + theta_2).

A step is one fourth-order Runge-Kutta step; then the angles are wrapped into [-pi, pi]
and the speeds clipped. Constants are those of Gymnasium's Acrobot-v1.

Differs from the paper in: one Runge-Kutta step of 0.2 s, not four Euler steps of
0.05 s; and the equations are the book's, with a term in theta_1'^2 that the paper's do
not have.

Reference: Sutton, Generalization in reinforcement learning, 1996; Sutton and Barto,
Reinforcement Learning: An Introduction, 1998, section 11.3.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.environments.rollout import Step, angle


@dataclasses.dataclass(frozen=True)
class Acrobot:
    """Constants, in kilograms, metres, seconds and radians.

    Attributes:
        gravity: g.
        masses: m_1 and m_2.
        length: l_1, the length of each link.
        centre: c_1 and c_2, from a link's joint to its centre of mass.
        inertia: I_1 and I_2, about the centre of mass.
        torque: the torque of action 2.
        max_speeds: largest absolute values of theta_1' and theta_2'.
        height: how far the tip has to rise above the bar, in lengths of a link.
        dt: seconds per step.
        start: largest absolute value of every entry of the first state.
        max_steps: largest number of steps in an episode.
    """

    gravity: float = 9.8
    masses: tuple[float, float] = (1.0, 1.0)
    length: float = 1.0
    centre: float = 0.5
    inertia: float = 1.0
    torque: float = 1.0
    max_speeds: tuple[float, float] = (4 * math.pi, 9 * math.pi)
    height: float = 1.0
    dt: float = 0.2
    start: float = 0.1
    max_steps: int = 500

    def __post_init__(self):
        for name in ("length", "centre", "inertia", "dt", "max_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but must be above 0."
                )
        for name in ("masses", "max_speeds"):
            if min(getattr(self, name)) <= 0:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but both must be above 0."
                )

    @property
    def observation_size(self) -> int:
        """[cos theta_1, sin theta_1, cos theta_2, sin theta_2, theta_1', theta_2']."""
        return 6

    @property
    def actions(self) -> int:
        """The torques -1, 0 and 1 times `torque`."""
        return 3

    def reset(self, key: Array) -> tuple[Float[Array, "4"], Float[Array, "6"]]:
        """A first state [theta_1, theta_2, theta_1', theta_2'] near rest."""
        state = jax.random.uniform(key, (4,), minval=-self.start, maxval=self.start)
        return state, _observe(state)

    def step(
        self, state: Float[Array, "4"], action: Int[Array, ""], key: Array
    ) -> Step:
        """Apply the torque for `dt`; the reward is -1, or 0 for the last step."""
        u = self.torque * (action.astype(jnp.float32) - 1)
        h = self.dt
        k1 = self._velocities(state, u)
        k2 = self._velocities(state + h / 2 * k1, u)
        k3 = self._velocities(state + h / 2 * k2, u)
        k4 = self._velocities(state + h * k3, u)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        limits = jnp.asarray(self.max_speeds)
        speeds = jnp.clip(state[2:], -limits, limits)
        state = jnp.concatenate([angle(state[:2]), speeds])
        done = -jnp.cos(state[0]) - jnp.cos(state[0] + state[1]) > self.height
        return Step(state, _observe(state), jnp.where(done, 0.0, -1.0), done)

    def _velocities(self, state, u):
        """d state / dt, with theta_1'' of the first equation put into the second."""
        theta_1, theta_2, speed_1, speed_2 = state
        m_1, m_2 = self.masses
        l, c, I, g = self.length, self.centre, self.inertia, self.gravity
        sin, cos = jnp.sin(theta_2), jnp.cos(theta_2)
        d_1 = m_1 * c**2 + m_2 * (l**2 + c**2 + 2 * l * c * cos) + 2 * I
        d_2 = m_2 * (c**2 + l * c * cos) + I
        d_3 = m_2 * c**2 + I
        phi_2 = m_2 * c * g * jnp.sin(theta_1 + theta_2)
        phi_1 = (
            -m_2 * l * c * (speed_2**2 + 2 * speed_1 * speed_2) * sin
            + (m_1 * c + m_2 * l) * g * jnp.sin(theta_1)
            + phi_2
        )
        centrifugal = m_2 * l * c * speed_1**2 * sin
        acceleration_2 = (u + d_2 / d_1 * phi_1 - centrifugal - phi_2) / (
            d_3 - d_2**2 / d_1
        )
        acceleration_1 = -(d_2 * acceleration_2 + phi_1) / d_1
        return jnp.stack([speed_1, speed_2, acceleration_1, acceleration_2])


def _observe(state: Float[Array, "4"]) -> Float[Array, "6"]:
    theta_1, theta_2, speed_1, speed_2 = state
    cos, sin = jnp.cos, jnp.sin
    return jnp.stack(
        [cos(theta_1), sin(theta_1), cos(theta_2), sin(theta_2), speed_1, speed_2]
    )
