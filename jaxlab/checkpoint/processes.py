"""Agreement between the processes of a run, which all make the same calls."""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def from_process_0(value: int) -> int:
    """Return the value that process 0 has."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def gather_json(value: Any) -> list:
    """Return the JSON values of all processes, on every process."""
    text = json.dumps(value).encode()
    if jax.process_count() == 1:
        return [json.loads(text)]
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.frombuffer(text.ljust(int(lengths.max())), np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row.tobytes()) for row in rows]


def first_reason(reason: str | None) -> str | None:
    """This process's reason, or that another process has one, or None everywhere."""
    if jax.process_count() == 1:
        return reason
    bad = multihost_utils.process_allgather(np.bool_(reason is not None))
    if reason is None and bad.any():
        return f"process {int(np.argmax(bad))} could not read its part"
    return reason
