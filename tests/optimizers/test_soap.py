"""SOAP against its algorithm in float64, and what follows from it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.nn.initializers import zeros

from jaxlab import params
from jaxlab.optimizers.placement import abstract_opt_state
from jaxlab.optimizers.shampoo import Sides
from jaxlab.optimizers.soap import SOAP, scale_by_soap
from jaxlab.params import ParamSpec

# Square, because an average of few gradients leaves the longer side of others singular,
# and eigenvectors of equal eigenvalues are any.
N, OUT, STEPS = 4, 3, 9
SPECS = {
    "w": ParamSpec((N, N), (None, None)),
    "tall": ParamSpec((N, OUT), (None, None)),
    "b": ParamSpec((N,), (None,), zeros, "bias"),
}
ONE_SIDED = {"w": SPECS["tall"]}
SETTINGS = {"b1": 0.8, "b2": 0.9, "eps": 1e-3}


def gradients(specs, seed=0, steps=STEPS):
    rng = np.random.default_rng(seed)
    return [
        {name: rng.standard_normal(spec.shape) for name, spec in specs.items()}
        for _ in range(steps)
    ]


def run(tx, gs, state=None):
    """The updates of all steps, in float64."""
    update, found = jax.jit(tx.update), []
    state = tx.init(gs[0]) if state is None else state
    for g in gs:
        u, state = update(jax.tree.map(jnp.float32, g), state)
        found.append(jax.tree.map(lambda x: np.asarray(x, np.float64), u))
    return found


def rotation(n, rng):
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


# The formulas -------------------------------------------------------------------------


def adam(gs, b1, b2, eps):
    m = v = 0.0
    for t, g in enumerate(gs, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        yield m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)


def first_basis(F):
    U, _, _ = np.linalg.svd(F)  # singular values fall
    return U


def falling(F, Q):
    """The columns of Q from where F is largest."""
    return np.argsort([-q @ F @ q for q in Q.T])


def next_basis(F, Q, order):
    """The basis after a step of the power iteration, from columns in that order."""
    S = F @ Q[:, order]
    for j in range(len(F)):  # Gram and Schmidt
        for i in range(j):
            S[:, j] -= (S[:, i] @ S[:, j]) * S[:, i]
        S[:, j] /= np.linalg.norm(S[:, j])
    return S


def soap(gs, period, b1, b2, eps, left=True, ordered=falling):
    """Algorithms 3 and 4 of the paper, with the first step of the authors' code.

    As there, the mean is kept in the bases and carried over when they change. `ordered`
    gives the order of a basis before its turn.
    """
    (n_in, n_out), first = gs[0].shape, gs[0]
    L, R = (1 - b2) * first @ first.T, (1 - b2) * first.T @ first
    QL, QR = first_basis(L) if left else np.eye(n_in), first_basis(R)
    M, V = np.zeros((n_in, n_out)), np.zeros((n_in, n_out))
    yield np.zeros_like(first)
    for t, g in enumerate(gs[1:], 1):
        rotated = QL.T @ g @ QR
        M, V = b1 * M + (1 - b1) * rotated, b2 * V + (1 - b2) * rotated**2
        n = M / (1 - b1**t) / (np.sqrt(V / (1 - b2**t)) + eps)
        yield QL @ n @ QR.T
        L, R = b2 * L + (1 - b2) * g @ g.T, b2 * R + (1 - b2) * g.T @ g
        if t % period == 0:
            M = QL @ M @ QR.T
            if left:
                order = ordered(L, QL)
                QL, V = next_basis(L, QL, order), V[order]
            order = ordered(R, QR)
            QR, V = next_basis(R, QR, order), V[:, order]
            M = QL.T @ M @ QR


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("period", (1, 3))
def test_updates_are_those_of_the_algorithm(period, seed):
    specs = {name: SPECS[name] for name in ("w", "b")}
    gs = gradients(specs, seed)
    found = run(scale_by_soap(specs, period=period, **SETTINGS), gs)
    want = soap([g["w"] for g in gs], period, **SETTINGS)
    for u, w in zip(found, want, strict=True):
        np.testing.assert_allclose(u["w"], w, rtol=1e-3, atol=1e-3)
    want = adam([g["b"] for g in gs], **SETTINGS)
    for u, w in zip(found, want, strict=True):
        np.testing.assert_allclose(u["b"], w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("period", (1, 3))
def test_a_large_side_is_left_alone(period):
    gs = gradients(ONE_SIDED)
    found = run(scale_by_soap(ONE_SIDED, period=period, largest=OUT, **SETTINGS), gs)
    want = soap([g["w"] for g in gs], period, left=False, **SETTINGS)
    for u, w in zip(found, want, strict=True):
        np.testing.assert_allclose(u["w"], w, rtol=1e-3, atol=1e-3)


def test_the_order_of_columns_changes_and_the_squares_with_it():
    """Gradients that change what is large: a basis without sorting differs."""
    scale = np.diag([8.0, 4.0, 2.0, 1.0])
    gs = [
        {"w": g["w"] @ (scale if n < 3 else scale[::-1, ::-1])}
        for n, g in enumerate(gradients({"w": SPECS["w"]}, steps=12))
    ]
    found = run(scale_by_soap({"w": SPECS["w"]}, period=1, **SETTINGS), gs)
    changed = []

    def ordered(F, Q):
        changed.append((falling(F, Q) != np.arange(N)).any())
        return falling(F, Q)

    want = list(soap([g["w"] for g in gs], 1, ordered=ordered, **SETTINGS))
    assert sum(changed) >= 3
    for u, w in zip(found, want, strict=True):
        np.testing.assert_allclose(u["w"], w, rtol=5e-3, atol=5e-3)
    *_, unsorted = soap(
        [g["w"] for g in gs], 1, ordered=lambda F, _: np.arange(len(F)), **SETTINGS
    )
    assert np.abs(unsorted - want[-1]).max() > 0.1


# What follows from them ---------------------------------------------------------------


def test_the_first_step_moves_what_has_no_basis():
    (g,) = gradients(SPECS, steps=1)
    (u,) = run(scale_by_soap(SPECS), [g])
    assert not u["w"].any() and not u["tall"].any()
    np.testing.assert_allclose(u["b"], np.sign(g["b"]), rtol=1e-5)


def test_identity_bases_are_adam():
    """A step later, because the first gradient only makes the bases."""
    gs = gradients(SPECS)
    tx = scale_by_soap(SPECS, period=100, **SETTINGS)
    _, state = tx.update(jax.tree.map(jnp.float32, gs[0]), tx.init(gs[0]))
    eyes = jax.tree.map(lambda q: jnp.eye(len(q)), state.bases)
    found = run(tx, gs[1:], state._replace(bases=eyes))
    base = optax.scale_by_adam(**SETTINGS)
    state = base.init(jax.tree.map(jnp.float32, gs[0]))
    for u, g in zip(found, gs[1:], strict=True):
        with jax.numpy_dtype_promotion("standard"):
            want, state = base.update(jax.tree.map(jnp.float32, g), state)
        for name in ("w", "tall"):
            np.testing.assert_allclose(u[name], want[name], rtol=1e-5, atol=1e-6)


def test_diagonal_factors_are_adam():
    """Gradients with one entry a row and a column: their bases are permutations."""
    rng, specs = np.random.default_rng(0), {"w": SPECS["w"]}
    gs = [{"w": np.diag(rng.standard_normal(N) + [9, 7, 5, 3])} for _ in range(STEPS)]
    found = run(scale_by_soap(specs, period=2, **SETTINGS), gs)
    want = adam([g["w"] for g in gs[1:]], **SETTINGS)
    for u, w in zip(found[1:], want, strict=True):
        np.testing.assert_allclose(u["w"], w, rtol=1e-4, atol=1e-5)


def test_a_weight_with_two_large_sides_gets_adam_at_once():
    gs = gradients({"w": SPECS["w"]})
    found = run(scale_by_soap({"w": SPECS["w"]}, largest=N - 1, **SETTINGS), gs)
    for u, w in zip(found, adam([g["w"] for g in gs], **SETTINGS), strict=True):
        np.testing.assert_allclose(u["w"], w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_a_rotated_problem_has_the_rotated_updates(seed):
    """Whatever the orthogonal P and Q: Adam's updates, for one, do not rotate."""
    rng, specs = np.random.default_rng(seed), {"w": SPECS["w"]}
    P, Q = rotation(N, rng), rotation(N, rng)
    gs = gradients(specs, seed)
    rotated = [{"w": P.T @ g["w"] @ Q} for g in gs]
    tx = scale_by_soap(specs, period=2, **SETTINGS)
    for u, v in zip(run(tx, gs), run(tx, rotated), strict=True):
        np.testing.assert_allclose(v["w"], P.T @ u["w"] @ Q, rtol=1e-3, atol=1e-3)
    *_, a = adam([g["w"] for g in gs], **SETTINGS)
    *_, b = adam([g["w"] for g in rotated], **SETTINGS)
    assert np.abs(b - P.T @ a @ Q).max() > 0.05


def test_bases_stay_orthogonal_and_come_near_the_eigenvectors():
    """After 200 turns of stacked factors that settle."""
    specs = params.stack({"w": ParamSpec((8, 8), (None, None))}, 2)
    scale = np.diag(2.0 ** -np.arange(8))
    gs = [{"w": scale @ g["w"] @ scale} for g in gradients(specs, steps=200)]
    tx = scale_by_soap(specs, b2=0.99, period=1)
    update, state = jax.jit(tx.update), tx.init(gs[0])
    for g in gs:
        _, state = update(jax.tree.map(jnp.float32, g), state)
    for factor, basis in zip(state.factors["w"], state.bases["w"], strict=True):
        for F, Q in zip(np.float64(factor), np.float64(basis), strict=True):
            np.testing.assert_allclose(Q.T @ Q, np.eye(8), atol=1e-5)
            D = Q.T @ F @ Q
            size = np.sqrt(np.outer(np.diag(D), np.diag(D)))
            assert np.abs(D / size - np.eye(8)).max() < 0.2


def test_gradients_of_zero_stay_zero():
    zero = jax.tree.map(np.zeros_like, gradients(SPECS, steps=1)[0])
    for u in run(scale_by_soap(SPECS, period=1), [zero] * 3):
        jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), u)


def test_factors_and_bases_stay_whole_on_a_mesh():
    """As they are created, step by step, so that one program serves all."""
    specs = {"w": ParamSpec((2, 16, 8), ("layers", "width", "hidden"))}
    mesh = params.make_mesh(params.MeshConfig(data=2, fsdp=2, tensor=2))
    tx = scale_by_soap(specs, period=1)
    placed = jax.tree.map(lambda x: x.sharding, abstract_opt_state(tx, specs, mesh))
    with jax.set_mesh(mesh):
        gs = jax.device_put(
            [jax.tree.map(jnp.float32, g) for g in gradients(specs, steps=2)],
            [params.shardings(specs, mesh)] * 2,
        )
        state, update = jax.device_put(tx.init(gs[0]), placed), jax.jit(tx.update)
        for g in gs:
            _, state = update(g, state)
        assert update._cache_size() == 1
    for kept in (state.factors, state.bases):
        assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(kept))
    assert state.mu["w"].sharding.spec == placed.mu["w"].spec


def test_only_matrices_have_bases():
    state = scale_by_soap(SPECS, largest=OUT).init(gradients(SPECS)[0])
    assert state.bases.keys() == state.factors.keys() == {"tall"}
    assert state.bases["tall"] == Sides(None, state.bases["tall"].right)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"b1": 1.0}, "b1=1.0 must be at least 0 and below 1; it is the share"),
        ({"b2": -0.1}, "b2=-0.1 must be at least 0 and below 1"),
        ({"eps": 0.0}, "eps=0.0 must be finite and above 0"),
        ({"period": 0}, "period=0 must be a whole number of steps, at least 1"),
        ({"largest": 0}, "largest=0 must be a whole number, at least 1; it is the"),
    ),
)
def test_settings_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        scale_by_soap(SPECS, **change)
    with pytest.raises(ValueError, match=message):
        SOAP(**change).build(SPECS, 1000)
