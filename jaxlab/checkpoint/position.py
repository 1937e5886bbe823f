"""The position in the data, of the iterator of every process."""

from typing import Any

import jax

from jaxlab.checkpoint.errors import CheckpointError
from jaxlab.checkpoint.processes import gather_json


def data_positions(data_iterator: Any) -> list | None:
    """Return the position of every process's iterator, on every process."""
    if data_iterator is None:
        return None
    position = data_iterator.get_state()
    if isinstance(position, bytes):
        position = {"bytes": position.decode()}
    return gather_json(position)


def set_position(data_iterator: Any, positions: list | None, step: int) -> None:
    """Move this process's iterator to its saved position.

    An iterator with a method `start_at` counts its batches in steps, so that the number
    of the step says where a checkpoint without a position goes on. One that is `shared`
    has the same position on every process, and any number of processes may go on.

    Raises:
        CheckpointError: no positions were saved, or those of another number of
            processes.
    """
    if positions is None and hasattr(data_iterator, "start_at"):
        data_iterator.start_at(step)
        return
    if positions is None:
        raise CheckpointError(
            f"Step {step} was saved without a data iterator, so there is no position "
            "to restore; pass no data_iterator to start the data from its beginning."
        )
    shared = getattr(data_iterator, "shared", False)
    if len(positions) != jax.process_count() and not shared:
        raise CheckpointError(
            f"Step {step} holds the data positions of {len(positions)} processes and "
            f"this run has {jax.process_count()}, each of which would read another "
            "part of the data. Use as many processes, or pass no data_iterator to "
            "start the data from its beginning."
        )
    position = positions[0 if shared else jax.process_index()]
    if isinstance(position, dict) and position.keys() == {"bytes"}:
        position = position["bytes"].encode()
    data_iterator.set_state(position)
