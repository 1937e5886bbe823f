"""The taps a training step hands to an optimizer: whole, whoever computed what."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import models, params
from jaxlab.mixers import gla
from jaxlab.models import LMConfig
from jaxlab.objectives import NextToken
from jaxlab.optimizers.mkor import preconditioned
from jaxlab.training.state import create_state
from jaxlab.training.step import make_train_step

MODEL = LMConfig(width=16, n_layers=2, pattern=(gla.Config(16, n_heads=4),))
SPECS = models.spec(MODEL)
TAPPED = preconditioned(SPECS)
ROWS, LENGTH = 8, 12


def batch():
    """Half of the rows' second halves are padding."""
    rng = np.random.default_rng(1)
    draw = lambda: rng.integers(0, 257, (ROWS, LENGTH)).astype(np.int32)  # noqa: E731
    real = np.ones((ROWS, LENGTH), bool)
    real[::2, LENGTH // 2 :] = False
    return {
        "inputs": draw(),
        "targets": draw(),
        "weights": real.astype(np.float32),
        "segment_ids": np.where(real, 0, -1).astype(np.int32),
    }


def recorder():
    """An optimizer whose state is the statistics it was given."""

    def init(weights):
        del weights
        taps = params.untap(params.tap(models.init(MODEL, jax.random.key(0)), TAPPED))
        return taps[1]

    def update(updates, state, weights=None, *, stats, **_):
        return jax.tree.map(jnp.zeros_like, updates), stats

    return optax.GradientTransformationExtraArgs(init, update)


def statistics(mesh_cfg, accumulate=1):
    devices = jax.devices()[: 1 if mesh_cfg == params.MeshConfig(data=1) else 8]
    mesh = params.make_mesh(mesh_cfg, devices)
    with jax.set_mesh(mesh):
        state = create_state(models.spec(MODEL), recorder(), mesh, seed=0)
        step = make_train_step(NextToken(MODEL), recorder(), accumulate, TAPPED)
        for _ in range(2):
            state, _ = step(state, params.place_rows(batch(), mesh), jax.random.key(0))
        assert step._cache_size() == 1
    return jax.device_get(state.opt_state)


@pytest.fixture(scope="module")
def alone():
    return statistics(params.MeshConfig(data=1))


@pytest.mark.parametrize(
    ("mesh_cfg", "accumulate"),
    [
        (params.MeshConfig(data=1), 4),
        (params.MeshConfig(data=2, tensor=4), 1),
        (params.MeshConfig(data=2, fsdp=2, tensor=2), 2),
    ],
    ids=("parts", "2x4", "parts on 2x2x2"),
)
def test_meshes_and_parts_do_not_change_the_statistics(mesh_cfg, accumulate, alone):
    for got, want in zip(
        *map(jax.tree.leaves, (statistics(mesh_cfg, accumulate), alone)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * abs(want).max())


def test_padding_is_not_counted(alone):
    """Nor, for a forget gate, the first token of a row, which has nothing to forget."""
    tokens = int(batch()["weights"].sum())
    taps = jax.tree_util.tree_leaves_with_path(alone, is_leaf=is_tap)
    assert len(taps) == sum(jax.tree.leaves(TAPPED))
    found = {params.path_name(path): tap.rows for path, tap in taps}
    forgets = {name for name, rows in found.items() if (rows == tokens - ROWS).all()}
    assert {name.split("/")[-1] for name in forgets} == {"w_decay_in", "w_decay_out"}
    for name in found.keys() - forgets:
        np.testing.assert_array_equal(found[name], tokens)


def is_tap(x):
    return isinstance(x, params.Tap)
