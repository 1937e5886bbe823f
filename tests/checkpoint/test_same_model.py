"""A checkpoint of another model is refused, and what differs is said."""

import jax.numpy as jnp
import pytest
from saved_states import CONFIG, abstract, entries, mesh, put, small_state, write

from jaxlab.checkpoint import CheckpointError, Checkpoints


def test_another_model_is_refused_and_nothing_is_moved(tmp_path):
    write(tmp_path, [1, 2])
    config = {"model": {"width": 4, "remat": False}, "learning_rate": 1e-3}
    state = small_state(0)
    state["params"] = {"w": put(jnp.zeros((16, 4)), mesh(4, 2)), "b": jnp.zeros(4)}
    del state["step"]
    with pytest.raises(CheckpointError) as error:
        Checkpoints(tmp_path, config=config).restore(abstract(state))
    message = str(error.value)
    assert "belongs to another model" in message
    assert "model.width: 8 in the checkpoint, 4 now" in message
    assert (
        "params.w: 'float32[16, 8]' in the checkpoint, 'float32[16, 4]' now" in message
    )
    assert "params.b: absent in the checkpoint" in message
    assert "step: 'int32[]' in the checkpoint, absent now" in message
    assert "learning_rate" not in message
    assert entries(tmp_path) == ["1", "2"]


def test_model_fields_must_agree_even_if_the_shapes_do(tmp_path):
    write(tmp_path, [1])
    state = abstract(small_state(0))
    other = {"model": {"width": 8, "remat": True}, "learning_rate": 1e-4}
    with pytest.raises(CheckpointError, match="model.remat: False in the checkpoint"):
        Checkpoints(tmp_path, config=other).restore(state)
    allowed = Checkpoints(tmp_path, config=other, may_differ=["model.remat"])
    assert allowed.restore(state)[0] == 1


def test_many_differences_are_counted(tmp_path):
    state = {f"x{i:02}": jnp.zeros(2) for i in range(20)}
    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        checkpoints.save(1, state)
        wider = {name: jnp.zeros(3) for name in state}
        with pytest.raises(CheckpointError, match="code that builds .* and 12 more"):
            checkpoints.restore(abstract(wider))
