"""The batch of each step: always of one size, or growing by the norm test."""

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxlab.checkpoint import CheckpointError
from jaxlab.optimizers import BatchController, BatchState
from jaxlab.training.source import check_same_data


class Numbered:
    """Batches that are a function of their number, the same on every process.

    Args:
        batch: from 0, 1, 2, ... to a batch; a pure function.
        counts: the data that are counted, as JSON values; a position among others
            would be meaningless, so restoring it there is an error.
    """

    shared = True
    """Whether one position serves all processes, however many resume."""

    def __init__(
        self, batch: Callable[[int], Any], counts: dict[str, Any] | None = None
    ):
        self._batch = batch
        self._counts = counts or {}
        self.taken = 0  # batches taken since the beginning of the run

    def __next__(self) -> Any:
        batch = self._batch(self.taken)
        self.taken += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"counts": self._counts, "taken": self.taken}

    def set_state(self, state: dict[str, Any]) -> None:
        check_same_data(state["counts"], self._counts)
        self.taken = state["taken"]

    def start_at(self, step: int) -> None:
        """Go on after so many steps of one batch each."""
        self.taken = step


class SizedBatches(Protocol):
    """Endless batches of one size."""

    @property
    def taken(self) -> int:
        """Batches taken since the beginning of the run."""
        ...

    def __next__(self) -> Any: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class StepBatch(NamedTuple):
    """The batch of one step.

    Attributes:
        batch: this process's share of the rows.
        parts: the number of micro-batches that the model sees one by one.
        rows: the rows of all processes together.
        rows_seen: the rows of all steps of the run so far, including this one.
        grown: whether the step before had fewer rows.
    """

    batch: Any
    parts: int
    rows: int
    rows_seen: int
    grown: bool


class StepBatches:
    """Endless batches of a run, saved together with what decides their size.

    A grown step takes the next k batches of the data, and its micro-batches are theirs,
    on any number of processes: row r of the m-th goes to row k r + m, and a step of P
    parts takes rows i, i + P, ... as its part i.

    The norm test of step n decides the batch of step n + 2: when a step is given to the
    devices the one before is still computed, so that nobody waits for its numbers. What
    is saved is therefore what two steps want.

    Args:
        batches: of `size` rows.
        size: rows of a batch, over all processes.
        parts: micro-batches of a batch.
        controller: decides how many batches a step takes; None for one.
    """

    def __init__(
        self,
        batches: SizedBatches,
        size: int,
        parts: int = 1,
        controller: BatchController | None = None,
    ):
        self._batches = batches
        self._size = size
        self._parts = parts
        self._controller = controller
        # From the oldest step whose test was not read to the last one decided.
        self._states = deque([BatchState(size)] * 2)
        self._unread = deque[int]()  # parts of the steps whose test was not read
        self._rows: int | None = None  # of the last step

    @property
    def shared(self) -> bool:
        """Whether one position serves all processes, as that of `Numbered` does."""
        return getattr(self._batches, "shared", False)

    @property
    def start_at(self) -> Callable[[int], None]:
        """The method of the batches, where they have one, as `Numbered` does."""
        return self._batches.start_at  # type: ignore[attr-defined]

    def __next__(self) -> StepBatch:
        parts = self._parts
        if self._controller is not None:
            parts = self._controller.parts(self._states[len(self._unread)])
            self._unread.append(parts)
        times = parts // self._parts
        taken = [next(self._batches) for _ in range(times)]
        batch = jax.tree.map(
            lambda *x: np.stack(x, axis=1).reshape(-1, *x[0].shape[1:]), *taken
        )
        rows, before = times * self._size, self._rows
        self._rows = rows
        grown = before is not None and rows > before
        return StepBatch(batch, parts, rows, self._batches.taken * self._size, grown)

    def read(self, values: Mapping[str, float]) -> dict[str, float]:
        """Read the norm test of the oldest step that was not read.

        Args:
            values: metrics of the step, with ``part_gradient_norm`` and
                ``gradient_norm`` as `jaxlab.objectives.gradient_step` gives them.

        Returns:
            ``wanted_rows``, the rows that the tests so far have asked for; nothing
            where the batch does not grow or a norm is not finite, which ends the run.
        """
        if self._controller is None:
            return {}
        norms = values["part_gradient_norm"], values["gradient_norm"]
        if not all(map(math.isfinite, norms)):
            return {}
        state, parts = self._states.popleft(), self._unread.popleft()
        now = self._controller.update(
            state,
            squares=parts * norms[0] ** 2,
            mean_square=norms[1] ** 2,
            groups=parts,
        )
        self._states.append(max(self._states[-1], now))
        return {"wanted_rows": float(self._states[-1].wanted)}

    def get_state(self) -> dict[str, Any]:
        """The position, to be saved when every step's test has been read."""
        state = self._batches.get_state()
        if self._controller is None:
            return state
        return state | {"wanted": [state.wanted for state in self._states]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a saved position.

        Raises:
            CheckpointError: the batch had grown beyond what it may be now.
        """
        controller = self._controller
        wanted = state.get("wanted", [self._size, self._size])
        largest = self._size if controller is None else controller.largest
        if max(wanted) > largest:
            raise CheckpointError(
                f"The run's batch has grown to {max(wanted)} rows, which is above "
                f"{'the batch size' if controller is None else 'growth.largest'}="
                f"{largest}; a batch never shrinks. Continue it with a larger "
                "growth.largest, or start a new run from its parameters (init_from)."
            )
        self._batches.set_state(state)
        self._states = deque(BatchState(rows) for rows in wanted)
        self._unread.clear()
        self._rows = None
