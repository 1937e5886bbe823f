"""CartPole: keep a pole upright on a cart by pushing the cart left or right.

With x the position of the cart, theta the pole's angle from upright, l half the pole's
length and the uniform pole's moment of inertia m l^2 / 3, the equations of motion are

    (M + m) x'' + m l theta'' cos(theta) - m l theta'^2 sin(theta) = F
    m l x'' cos(theta) + 4/3 m l^2 theta'' - m g l sin(theta) = 0.

Constants, limits and the explicit Euler step are those of Gymnasium's CartPole-v1.

Differs from the paper in: no friction of cart and joint; the reward is 1 for every
step, including the one in which the pole falls, and not -1 for the fall.

Reference: Barto, Sutton and Anderson, Neuronlike adaptive elements that can solve
difficult learning control problems, 1983.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.environments.rollout import Step


@dataclasses.dataclass(frozen=True)
class CartPole:
    """Constants, in kilograms, metres, seconds and radians.

    Attributes:
        gravity: g.
        cart_mass: M.
        pole_mass: m.
        half_length: l, from the joint to the pole's centre.
        force: the force of a push.
        dt: seconds per step.
        x_limit: largest absolute value of x.
        angle_limit: largest absolute value of theta.
        start: largest absolute value of every entry of the first state.
        max_steps: largest number of steps in an episode.
    """

    gravity: float = 9.8
    cart_mass: float = 1.0
    pole_mass: float = 0.1
    half_length: float = 0.5
    force: float = 10.0
    dt: float = 0.02
    x_limit: float = 2.4
    angle_limit: float = 12 * math.pi / 180
    start: float = 0.05
    max_steps: int = 500

    def __post_init__(self):
        for name in ("cart_mass", "pole_mass", "half_length", "dt", "max_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but must be above 0."
                )

    @property
    def observation_size(self) -> int:
        """The whole state."""
        return 4

    @property
    def actions(self) -> int:
        """0 pushes to the left, 1 to the right."""
        return 2

    def reset(self, key: Array) -> tuple[Float[Array, "4"], Float[Array, "4"]]:
        """A first state [x, x', theta, theta'] near rest; it is the observation."""
        state = jax.random.uniform(key, (4,), minval=-self.start, maxval=self.start)
        return state, state

    def step(
        self, state: Float[Array, "4"], action: Int[Array, ""], key: Array
    ) -> Step:
        """Push for `dt`; done when the cart or the pole is beyond its limit."""
        x, x_dot, theta, theta_dot = state
        force = jnp.where(action == 1, self.force, -self.force)
        x_ddot, theta_ddot = self._accelerations(force, theta, theta_dot)
        velocities = jnp.stack([x_dot, x_ddot, theta_dot, theta_ddot])
        state = state + self.dt * velocities
        fallen = (jnp.abs(state[0]) > self.x_limit) | (
            jnp.abs(state[2]) > self.angle_limit
        )
        return Step(state, state, jnp.ones(()), fallen)

    def _accelerations(self, force, theta, theta_dot):
        """x'' and theta'', with x'' of the first equation put into the second."""
        l, m = self.half_length, self.pole_mass
        share = m / (self.cart_mass + m)
        sin, cos = jnp.sin(theta), jnp.cos(theta)
        # x'' of the cart if the pole's angle did not accelerate
        alone = force / (self.cart_mass + m) + share * l * theta_dot**2 * sin
        theta_ddot = (self.gravity * sin - alone * cos) / (l * (4 / 3 - share * cos**2))
        return alone - share * l * theta_ddot * cos, theta_ddot
