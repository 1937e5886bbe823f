"""The position in the data is saved and restored."""

import grain
import jax.numpy as jnp
import numpy as np
import pytest
from saved_states import CONFIG, abstract, small_state, write

from jaxlab.checkpoint import CheckpointError, Checkpoints


@pytest.mark.parametrize("kind", ["dataset", "loader"])
def test_data_continues_where_it_was(tmp_path, kind):
    def iterator():
        if kind == "dataset":
            dataset = grain.MapDataset.range(100).shuffle(seed=3).batch(2)
            return iter(dataset.to_iter_dataset())
        sampler = grain.samplers.IndexSampler(
            100,
            shuffle=True,
            seed=3,
            num_epochs=1,
            shard_options=grain.sharding.NoSharding(),
        )
        source = grain.sources.RangeDataSource(0, 100, 1)
        return iter(grain.DataLoader(data_source=source, sampler=sampler))

    with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
        first = iterator()
        for _ in range(5):
            next(first)
        checkpoints.save(1, {"x": jnp.ones(3)}, first)
        expected = [np.asarray(next(first)).tolist() for _ in range(4)]
        second = iterator()
        checkpoints.restore(abstract({"x": jnp.ones(3)}), second)
    assert [np.asarray(next(second)).tolist() for _ in range(4)] == expected


def test_restoring_data_that_was_not_saved_is_refused(tmp_path):
    write(tmp_path, [1])
    with pytest.raises(CheckpointError, match="saved without a data iterator"):
        Checkpoints(tmp_path, config=CONFIG).restore(
            abstract(small_state(1)), iter(grain.MapDataset.range(4).to_iter_dataset())
        )
