"""The control problems against mechanics written another way, in float64.

The oracles know where the masses are, not the textbooks' solved equations: a centre of
mass at p(q) moves with p'' = J q'' + K, K what remains at q'' = 0, and d'Alembert's
principle sum_i m_i J_i^T (J_i q'' + K_i - g) + sum_i I_i w_i w_i^T q'' = u is solved
for q''.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.environments import Acrobot, Box, CartPole, Pendulum

KEY = jax.random.key(3)
ENVIRONMENTS = (CartPole(), Pendulum(), Acrobot())
IDS = ("cartpole", "pendulum", "acrobot")
every = pytest.mark.parametrize("environment", ENVIRONMENTS, ids=IDS)


def accelerations(bodies, inertias, forces, gravity):
    """q'' by d'Alembert; bodies (m, J, K), inertias (I, w)."""
    size = len(forces)
    mass, rest = np.zeros((size, size)), np.array(forces, float)
    for m, J, K in bodies:
        mass += m * J.T @ J
        rest -= m * J.T @ (K - np.array([0.0, -gravity]))
    for I, w in inertias:
        mass += I * np.outer(w, w)
    return np.linalg.solve(mass, rest)


def cartpole_accelerations(env, q, v, force):
    (_, theta), (_, omega), l = q, v, env.half_length
    s, c = math.sin(theta), math.cos(theta)
    cart = (env.cart_mass, np.array([[1.0, 0], [0, 0]]), np.zeros(2))
    # The centre of the pole is at (x + l sin, l cos).
    J = np.array([[1.0, l * c], [0, -l * s]])
    pole = (env.pole_mass, J, omega**2 * np.array([-l * s, -l * c]))
    spin = (env.pole_mass * l**2 / 3, np.array([0.0, 1]))
    return accelerations([cart, pole], [spin], [force, 0.0], env.gravity)


def acrobot_accelerations(env, q, v, torque):
    (q1, q2), (v1, v2), l, c = q, v, env.length, env.centre
    s1, c1 = math.sin(q1), math.cos(q1)
    s12, c12 = math.sin(q1 + q2), math.cos(q1 + q2)
    # Centres are at c e(q1) and l e(q1) + c e(q1 + q2), with e(q) = (sin q, -cos q).
    J1 = c * np.array([[c1, 0], [s1, 0]])
    K1 = c * v1**2 * np.array([-s1, c1])
    J2 = np.array([[l * c1 + c * c12, c * c12], [l * s1 + c * s12, c * s12]])
    K2 = l * v1**2 * np.array([-s1, c1]) + c * (v1 + v2) ** 2 * np.array([-s12, c12])
    bodies = [(env.masses[0], J1, K1), (env.masses[1], J2, K2)]
    spins = [(env.inertia, np.array([1.0, 0])), (env.inertia, np.array([1.0, 1]))]
    return accelerations(bodies, spins, [0.0, torque], env.gravity)


def cartpole_step(env, state, action):
    x, v, theta, omega = state
    force = env.force if action == 1 else -env.force
    a, alpha = cartpole_accelerations(env, (x, theta), (v, omega), force)
    h = env.dt
    return np.array([x + h * v, v + h * a, theta + h * omega, omega + h * alpha])


def pendulum_step(env, state, action):
    """The rod about its fixed end: torques are I theta''."""
    theta, omega = state
    u = min(max(float(action[0]), -env.max_torque), env.max_torque)
    inertia = env.mass * env.length**2 / 3
    weight = env.mass * env.gravity * env.length / 2 * math.sin(theta)
    omega = omega + env.dt * (weight + u) / inertia
    omega = min(max(omega, -env.max_speed), env.max_speed)
    return np.array([theta + env.dt * omega, omega])


def acrobot_step(env, state, action):
    def f(y):
        rates = acrobot_accelerations(env, y[:2], y[2:], env.torque * (int(action) - 1))
        return np.concatenate([y[2:], rates])

    h, y = env.dt, np.asarray(state, float)
    k1 = f(y)
    k2 = f(y + h * k1 / 2)
    k3 = f(y + h * k2 / 2)
    k4 = f(y + h * k3)
    y = y + h * (k1 + 2 * k2 + 2 * k3 + k4) / 6
    most = np.array(env.max_speeds)
    return np.concatenate([y[:2], np.clip(y[2:], -most, most)])


STEPS = {CartPole: cartpole_step, Pendulum: pendulum_step, Acrobot: acrobot_step}


def unusual(environment):
    """Other constants than the usual ones, many of which are 1 and hide a factor."""
    match environment:
        case CartPole():
            return CartPole(9.0, 1.3, 0.4, 0.7, 8.0, 0.03)
        case Pendulum():
            return Pendulum(9.0, 1.3, 0.7, 1.5, 6.0, 0.03)
        case _:
            return Acrobot(9.0, (1.2, 0.7), 1.1, 0.4, 0.8, 1.5)


def actions(environment, rng, n):
    if isinstance(environment.actions, Box):
        return rng.uniform(-3, 3, (n, 1)).astype(np.float32)
    return rng.integers(environment.actions, size=n).astype(np.int32)


def wide_states(environment, rng, n):
    """Everywhere the dynamics are defined, fast and at any angle."""
    match environment:
        case CartPole():
            scale = (2.4, 3, math.pi, 5)
        case Pendulum():
            scale = (3 * math.pi, 8)
        case _:
            scale = (math.pi, math.pi, *environment.max_speeds)
    return rng.uniform(-1, 1, (n, len(scale))).astype(np.float32) * np.array(
        scale, np.float32
    )


def turns_apart(a, b):
    """The difference of two states whose angles count up to whole turns."""
    return np.abs(np.exp(1j * a) - np.exp(1j * b))


@every
@pytest.mark.parametrize("constants", ("usual", "unusual"))
def test_a_step_is_the_mechanics(environment, constants):
    """From 300 wide states; the error is float32's, of the largest term of a step."""
    if constants == "unusual":
        environment = unusual(environment)
    rng = np.random.default_rng(0)
    states = wide_states(environment, rng, 300)
    acts = actions(environment, rng, 300)
    keys = jax.random.split(KEY, 300)
    got = np.asarray(jax.jit(jax.vmap(environment.step))(states, acts, keys).state)
    step = STEPS[type(environment)]
    want = np.array(
        [step(environment, s, a) for s, a in zip(states, acts, strict=True)]
    )
    if isinstance(environment, Acrobot):
        # Four stages of accelerations of some hundreds for 0.2 s amplify roundings.
        assert np.quantile(turns_apart(got[:, :2], want[:, :2]), 0.99) < 1e-3
        error = np.abs(got[:, 2:] - want[:, 2:])
        assert np.quantile(error, 0.5) < 1e-5 and np.quantile(error, 0.99) < 1e-2
        assert np.abs(got[:, :2]).max() <= math.pi
    else:
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


@every
def test_a_trajectory_is_the_mechanics(environment):
    """300 steps from rest with random actions, the oracle going on from its own state.

    The systems are unstable, so errors grow; those of the first steps may not be more
    than roundings.
    """
    rng = np.random.default_rng(1)
    acts = actions(environment, rng, 300)
    state, _ = environment.reset(KEY)

    @jax.jit
    def run(state, acts):
        def one(state, action):
            state = environment.step(state, action, KEY).state
            return state, state

        return jax.lax.scan(one, state, acts)[1]

    got = np.asarray(run(state, acts))
    want, y = [], np.asarray(state, np.float64)
    for action in acts:
        y = STEPS[type(environment)](environment, y, action)
        want.append(y)
    want = np.array(want)
    if isinstance(environment, CartPole):
        got, want = got[:60], want[:60]  # then the pole has turned over
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
        return
    angles = 2 if isinstance(environment, Acrobot) else 1
    assert turns_apart(got[:, :angles], want[:, :angles]).max() < 2e-3
    np.testing.assert_allclose(got[:, angles:], want[:, angles:], atol=2e-3)


def cartpole_energy(env, y):
    x, v, theta, omega = np.asarray(y, np.float64)
    l, m = env.half_length, env.pole_mass
    speed = (v + l * omega * np.cos(theta)) ** 2 + (l * omega * np.sin(theta)) ** 2
    moving = env.cart_mass * v**2 + m * speed + m * l**2 / 3 * omega**2
    return moving / 2 + m * env.gravity * l * np.cos(theta)


def pendulum_energy(env, y):
    theta, omega = np.asarray(y, np.float64)
    m, l = env.mass, env.length
    return m * l**2 * omega**2 / 6 + m * env.gravity * l / 2 * np.cos(theta)


def acrobot_energy(env, y):
    q1, q2, v1, v2 = np.asarray(y, np.float64)
    l, c, (m1, m2) = env.length, env.centre, env.masses
    speed = (l * v1 * np.cos(q1) + c * (v1 + v2) * np.cos(q1 + q2)) ** 2
    speed += (l * v1 * np.sin(q1) + c * (v1 + v2) * np.sin(q1 + q2)) ** 2
    moving = m1 * (c * v1) ** 2 + m2 * speed + env.inertia * (v1**2 + (v1 + v2) ** 2)
    height = -m1 * c * np.cos(q1) - m2 * (l * np.cos(q1) + c * np.cos(q1 + q2))
    return moving / 2 + env.gravity * height


@pytest.mark.parametrize(
    ("environment", "energy", "state", "action", "seconds", "order"),
    (
        (CartPole(force=0.0), cartpole_energy, [0.0, 0.5, 0.15, 1.0], 0, 0.4, 1),
        (Pendulum(), pendulum_energy, [1.0, 0.5], [0.0], 0.4, 1),
        (Acrobot(), acrobot_energy, [0.5, -0.6, 0.4, 1.0], 1, 3.2, 5),
    ),
    ids=IDS,
)
def test_energy_is_kept_to_the_order_of_the_integrator(
    environment, energy, state, action, seconds, order
):
    """Half the step leaves 2^-order of the error.

    Of an oscillation Runge and Kutta's step keeps the energy to the order 5, one more
    than the state: its growth is |1 + z + .. + z^4 / 24| = 1 - |z|^6 / 144 at z = ih.
    """

    def drift(dt):
        env = dataclasses.replace(environment, dt=dt)
        steps = round(seconds / dt)

        @jax.jit
        def run(y):
            go = lambda _, y: env.step(y, jnp.asarray(action), KEY).state  # noqa: E731
            return jax.lax.fori_loop(0, steps, go, y)

        start = jnp.asarray(state)
        return abs(energy(env, run(start)) - energy(env, start))

    coarse = {1: 0.01, 5: 0.2}[order]
    first, second = drift(coarse), drift(coarse / 2)
    assert first < 0.05 * abs(energy(environment, state))
    assert 0.6 < first / second / 2**order < 1.7


@pytest.mark.parametrize(("entry", "limit"), ((0, 2.4), (2, 12 * math.pi / 180)))
@pytest.mark.parametrize("side", (-1, 1))
def test_cartpole_falls_beyond_the_limit_and_not_at_it(entry, limit, side):
    env = CartPole()
    edge = np.float32(limit)
    for value, falls in ((edge, False), (np.nextafter(edge, np.float32(9)), True)):
        # No speed, so the entry stays what it is.
        state = jnp.zeros(4).at[entry].set(side * value)
        after = env.step(state, jnp.int32(0), KEY)
        assert bool(after.done) == falls and float(after.reward) == 1.0


def test_acrobot_is_done_above_the_height_and_not_at_it():
    """Without weight, torque and speed the state stays what it is."""
    still = Acrobot(gravity=0.0, torque=0.0)

    def after(height, q):
        env = dataclasses.replace(still, height=float(height))
        return env.step(jnp.asarray([*q, 0.0, 0.0]), jnp.int32(1), KEY)

    for q in ((3.0, 0.4), (-2.0, -0.5), (0.7, 1.9), (math.pi, 0.0)):
        theta_1, theta_2 = after(1.0, q).state[:2]
        tip = np.asarray(-jnp.cos(theta_1) - jnp.cos(theta_1 + theta_2))
        assert tip == pytest.approx(-math.cos(q[0]) - math.cos(sum(q)), abs=1e-5)
        at, above = after(tip, q), after(np.nextafter(tip, np.float32(-9)), q)
        assert not at.done and float(at.reward) == -1.0
        assert above.done and float(above.reward) == 0.0
    assert Acrobot().height == 1.0


def test_acrobot_observes_both_angles_and_speeds():
    env = Acrobot()
    state, observation = env.reset(KEY)
    q1, q2, v1, v2 = np.asarray(state, np.float64)
    want = [math.cos(q1), math.sin(q1), math.cos(q2), math.sin(q2), v1, v2]
    np.testing.assert_allclose(observation, want, rtol=1e-6)
    fast = env.step(jnp.asarray([3.0, -3.0, 12.5, -28.0]), jnp.int32(2), KEY)
    assert np.abs(np.asarray(fast.state[:2])).max() <= np.float32(math.pi)
    assert abs(fast.state[2]) <= 4 * math.pi and abs(fast.state[3]) <= 9 * math.pi
    np.testing.assert_array_equal(fast.observation[4:], fast.state[2:])


def test_pendulum_pays_for_the_angle_in_a_half_turn_either_way():
    env = Pendulum()

    def cost(*state, u=0.0):
        return -float(env.step(jnp.asarray(state), jnp.asarray([u]), KEY).reward)

    half = np.float32(math.pi)
    for turns in range(-3, 4):
        for beyond in (-1e-3, 0.0, 1e-3):
            want = (math.pi - abs(beyond)) ** 2
            assert cost(math.pi + beyond + 2 * math.pi * turns, 0.0) == pytest.approx(
                want, abs=2e-5
            )
        assert cost(0.3 + 2 * math.pi * turns, 0.0) == pytest.approx(0.09, abs=1e-5)
    assert cost(-half, 0.0) == pytest.approx(math.pi**2, rel=1e-6)
    assert cost(np.nextafter(half, 0), 0.0) == pytest.approx(math.pi**2, rel=1e-6)
    # The state before the step pays, and a torque for what of it is applied.
    assert cost(0.5, -3.0, u=1.5) == pytest.approx(0.25 + 0.9 + 0.00225, rel=1e-6)
    assert cost(0.0, 0.0, u=7.0) == pytest.approx(0.004, rel=1e-6)


@every
def test_first_states_fill_their_range(environment):
    states, _ = jax.vmap(environment.reset)(jax.random.split(KEY, 2000))
    most = {
        CartPole: np.full(4, 0.05),
        Pendulum: np.array([math.pi, 1.0]),
        Acrobot: np.full(4, 0.1),
    }[type(environment)]
    states = np.asarray(states) / most
    assert np.abs(states).max() <= 1.0001
    np.testing.assert_allclose(states.mean(0), 0, atol=0.06)
    np.testing.assert_allclose(states.std(0), 1 / math.sqrt(3), rtol=0.05)


@every
def test_eight_at_once_are_eight_one_by_one(environment):
    keys = jax.random.split(KEY, 8)
    acts = jnp.asarray(actions(environment, np.random.default_rng(2), 8))
    traces = 0

    def both(key, action):
        nonlocal traces
        traces += 1
        state, observation = environment.reset(key)
        return observation, environment.step(state, action, key)

    together = jax.vmap(both)(keys, acts)
    one, traces = jax.jit(both), 0
    apart = [one(k, a) for k, a in zip(keys, acts, strict=True)]
    assert traces == 1, "the second call compiled again"
    apart = jax.tree.map(lambda *x: jnp.stack(x), *apart)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        together,
        apart,
    )
    observation, after = apart
    assert observation.shape == after.observation.shape
    assert observation.shape == (8, environment.observation_size)
    assert after.reward.shape == after.done.shape == (8,)


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: CartPole(dt=0.0), "dt is 0.0, but must be above 0"),
        (lambda: Pendulum(mass=-1.0), "mass is -1.0"),
        (lambda: Acrobot(max_steps=0), "max_steps is 0"),
        (lambda: Acrobot(masses=(1.0, 0.0)), "masses is .1.0, 0.0., but both"),
        (lambda: Box((0.0,), (1.0, 2.0)), "low has 1 entries and high 2"),
        (lambda: Box((0.0,), (0.0,)), "every entry of low must be below"),
    ),
)
def test_settings_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
