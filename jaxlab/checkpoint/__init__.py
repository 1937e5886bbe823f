"""Checkpoints: atomic, asynchronous, verified.

A checkpoint is one directory, `<directory>/<step>`, that orbax writes under a
temporary name and renames once complete. It holds two items:

  state   the arrays, flattened to {"params.embed.weight": array, ...}
  meta    one JSON file: the run's config, the metrics, the position of the data
          iterator of every process, and the shape, dtype and digest of every array

The digests do not depend on how an array is sharded, so a checkpoint is verified
after a restore onto any mesh. Only this package touches orbax.
"""

from jaxlab.checkpoint.errors import CheckpointError
from jaxlab.checkpoint.store import Checkpoints

__all__ = ["CheckpointError", "Checkpoints"]
