"""The record of a run: metrics.jsonl and TensorBoard files."""

import functools
import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxlab.training.record_file import RecordFile
from jaxlab.training.telling import tell

log = logging.getLogger(__name__)


class MetricWriter:
    """Writes metrics to `metrics.jsonl` and to TensorBoard files, on process 0.

    A line of metrics.jsonl is {"step": 20, "time": seconds since 1970, name: value}; a
    value that is not finite is null. A line cut short by a kill is dropped when the
    next run opens the file.

    Args:
        directory: made if missing; `tensorboard --logdir` takes it.
    """

    def __init__(self, directory: str | Path):
        self._file: RecordFile | None = None
        self._events: Any = None
        if jax.process_index() != 0:
            return
        self.path = Path(directory) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open()
        self._new_events = None
        if importlib.util.find_spec("tensorboardX") is None:
            tell(
                "No TensorBoard files are written, because tensorboardX is missing: "
                "pip install -e '.[plot]'. metrics.jsonl holds every metric.\n"
            )
        else:
            from jaxlab.training.tensorboard import EventFile

            self._new_events = functools.partial(EventFile, self.path.parent)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append the metrics of one step; a number or a scalar array each.

        What cannot be written, as on a full disk, is left out with a warning: a run is
        worth more than its record.
        """
        if self._file is None:
            return
        values = {name: float(value) for name, value in metrics.items()}
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        line = json.dumps({"step": step, "time": time.time(), **finite}) + "\n"
        try:
            self._file.append(line.encode())
        except OSError as error:
            log.warning("The metrics of step %s are not recorded: %s", step, error)
        if self._new_events is None:
            return
        try:
            self._events = self._events or self._new_events()
            self._events.write(step, values)
        except OSError as error:
            log.warning("TensorBoard's file lacks step %s: %s", step, error)

    def has(self, step: int, prefix: str) -> bool:
        """Whether the metrics hold one of this step whose name begins so."""
        if self._file is None:
            return True  # nothing is written
        return any(
            line["step"] == step and any(name.startswith(prefix) for name in line)
            for line in read_metrics(self.path)
        )

    def truncate_after(self, step: int) -> None:
        """Forget later steps, which a run continued from `step` writes again."""
        if self._file is None:
            return
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        if len(kept) < self.path.read_bytes().count(b"\n"):
            self.close()
            try:
                self._rewrite(kept)
            except OSError as error:
                log.warning(
                    "%s still has what followed step %d: %s", self.path, step, error
                )
            self._open()
        if self._new_events is None:
            return
        try:  # TensorBoard hides what is purged
            self._events = self._new_events(purge_step=step + 1)
        except OSError as error:
            log.warning(
                "TensorBoard still shows what followed step %d: %s", step, error
            )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._events is not None:
            self._events.close()
            self._events = None

    def _rewrite(self, lines: list[dict]) -> None:
        """Put a file of these lines in the place of the present one."""
        temporary = self.path.with_suffix(".tmp")
        try:
            with open(temporary, "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _open(self) -> None:
        if self.path.exists():
            content = self.path.read_bytes()
            if not content.endswith(b"\n"):
                os.truncate(self.path, content.rfind(b"\n") + 1)
        self._file = RecordFile(self.path)


def read_metrics(path: str | Path, *, strict: bool = False) -> list[dict]:
    """The lines of a metrics.jsonl, without a last one that was cut short.

    Damaged lines are left out with a warning: a run is worth more than its record.

    Args:
        path: the file.
        strict: whether a damaged line is an error instead.

    Raises:
        ValueError: `strict`, and a line is damaged; names the first such line.
    """
    lines = Path(path).read_bytes().split(b"\n")[:-1]
    parsed = [_parsed(line) for line in lines]
    damaged = [number for number, line in enumerate(parsed, 1) if line is None]
    if damaged and strict:
        raise ValueError(
            f"{path}, line {damaged[0]} is not a JSON object of numbers with a step; "
            "remove the line, or resume the run, which leaves it out."
        )
    if damaged:
        log.warning(
            "%s: %d damaged line(s) are left out, the first is line %d.",
            path,
            len(damaged),
            damaged[0],
        )
    return [line for line in parsed if line is not None]


def _parsed(line: bytes) -> dict | None:
    """The metrics of a line; None if it is damaged."""
    try:
        metrics = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(metrics, dict) or not isinstance(metrics.get("step"), int):
        return None
    numbers = all(isinstance(x, int | float | None) for x in metrics.values())
    return metrics if numbers else None
