"""The state's shardings fit what an optimizer keeps of a parameter."""

import jax

from jaxlab import models
from jaxlab.mixers import delta_product
from jaxlab.models import LMConfig
from jaxlab.optimizers import FRUGAL, AdamW
from jaxlab.params import MeshConfig, make_mesh
from jaxlab.training.state import abstract_state

WIDTH, HEADS = 32, 4
MODEL = LMConfig(
    width=WIDTH,
    n_layers=2,
    pattern=(delta_product.Config(WIDTH, n_heads=HEADS, n_householders=2),),
)


def shards(optimizer):
    """Size of a device's share of the first moments."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    state = abstract_state(
        models.spec(MODEL), optimizer.build(models.spec(MODEL), 1000), mesh
    )
    moments = jax.tree.map(lambda x: x.sharding.shard_shape(x.shape), state).opt_state
    adam = moments[1][0] if isinstance(optimizer, AdamW) else moments[1]
    return adam.mu["blocks"]["0"]["mixer"] | {"table": adam.mu["embedding"]}


def test_moments_are_split_as_the_parameters_are():
    found = shards(AdamW())
    assert found["w_q"] == (2, WIDTH // 2, WIDTH // 4)
    assert found["w_beta"] == (2, WIDTH // 2, 2 * HEADS // 4)


def test_what_devices_do_not_divide_stays_whole():
    found, every = shards(FRUGAL(density=0.25)), shards(AdamW())
    assert found["w_q"] == (2, WIDTH // 2, WIDTH // 4 // 4)
    assert found["w_beta"] == (2, WIDTH // 2, 2 * HEADS // 4)  # 2 of 8, not divided
    assert found["table"] == every["table"]
