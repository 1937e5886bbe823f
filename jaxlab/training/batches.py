"""The batch of each step: always of one size, or growing by AdAdaGrad's norm test."""

from collections import deque
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlab.checkpoint import CheckpointError
from jaxlab.data import Batch
from jaxlab.optimizers import BatchState
from jaxlab.training.config import TrainConfig
from jaxlab.training.source import TrainBatches


class StepBatch(NamedTuple):
    """What one step takes.

    Attributes:
        batch: this process's share of the rows.
        parts: micro-batches that they go through the model in.
        rows: of all processes together.
        rows_seen: of all steps of the run so far, these among them.
    """

    batch: Batch
    parts: int
    rows: int
    rows_seen: int


class StepBatches:
    """Endless batches of a run, saved together with what decides their size.

    A grown step takes the next k batches of the data, and its micro-batches are theirs,
    on any number of processes: row r of the m-th goes to row k r + m, and a step of P
    parts takes rows i, i + P, ... as its part i.

    The norm test of step n decides the batch of step n + 2: when a step is given to the
    devices the one before is still computed, so that nobody waits for its numbers. What
    is saved is therefore what two steps want.

    Args:
        batches: of `cfg.batch_size` rows.
        cfg: the run.
    """

    def __init__(self, batches: TrainBatches, cfg: TrainConfig):
        self._batches = batches
        self._cfg = cfg
        self._controller = cfg.batch_controller()
        # From the oldest step whose test was not read to the last one decided.
        self._states = deque([BatchState(cfg.batch_size)] * 2)
        self._unread = 0

    def __next__(self) -> StepBatch:
        parts = self._cfg.accumulate
        if self._controller is not None:
            parts = self._controller.parts(self._states[self._unread])
            self._unread += 1
        times = parts // self._cfg.accumulate
        taken = [next(self._batches) for _ in range(times)]
        batch = jax.tree.map(
            lambda *x: np.stack(x, axis=1).reshape(-1, *x[0].shape[1:]), *taken
        )
        size = self._cfg.batch_size
        return StepBatch(batch, parts, times * size, self._batches.taken * size)

    def tested(self, part_squares: float, mean_square: float) -> int:
        """Read the norm test of the oldest step that was not read.

        Args:
            part_squares: sum_j ||g_j||^2 over the parts' gradients.
            mean_square: ||g||^2 of the step's gradient, before clipping.

        Returns:
            Rows that the tests so far have asked for.
        """
        if self._controller is None:
            raise ValueError("This run has no growth, so that no test is to be read.")
        state = self._states.popleft()
        groups = self._controller.parts(state)
        now = self._controller.update(state, part_squares, mean_square, groups)
        self._states.append(max(self._states[-1], now))
        self._unread -= 1
        return self._states[-1].wanted

    def get_state(self) -> dict[str, Any]:
        """The position, to be saved when every step's test has been read."""
        state = self._batches.get_state()
        if self._controller is None:
            return state
        return state | {"wanted": [state.wanted for state in self._states]}

    def set_state(self, state: dict[str, Any]) -> None:
        growth, size = self._cfg.growth, self._cfg.batch_size
        wanted = state.get("wanted", [size, size])
        largest = size if growth is None else growth.largest
        if max(wanted) > largest:
            raise CheckpointError(
                f"The run's batch has grown to {max(wanted)} rows, which is above "
                f"{'batch_size' if growth is None else 'growth.largest'}={largest}; a "
                "batch never shrinks. Continue it with a larger growth.largest, or "
                "start a new run from its parameters with --init-from."
            )
        self._batches.set_state(state)
        self._states = deque(BatchState(rows) for rows in wanted)
        self._unread = 0
