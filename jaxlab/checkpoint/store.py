"""The checkpoints of one run: saving, restoring, and what a failure leaves."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxlab.checkpoint.arrays import (
    describe,
    flatten,
    keys_of,
    present_name,
    read_arrays,
    without_empty,
    words_of,
)
from jaxlab.checkpoint.digest import digests
from jaxlab.checkpoint.directory import (
    complete_steps,
    move_aside,
    remove_unfinished,
    resolved,
)
from jaxlab.checkpoint.echoes import silence_echoes
from jaxlab.checkpoint.errors import CheckpointError, disk_is_full, first_line
from jaxlab.checkpoint.position import data_positions, set_position
from jaxlab.checkpoint.processes import first_reason, from_process_0, gather_json
from jaxlab.checkpoint.retain import NewestAndBest
from jaxlab.checkpoint.verify import (
    check_same_model,
    damaged_arrays,
    read_meta,
    sealed,
)
from jaxlab.config import updated

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run: the newest `keep` and the best `keep_best`.

    Reading changes nothing on disk except that a damaged step is moved aside;
    the directory is created, and what an interrupted run left there is removed,
    by the first `save`. Every process of a run makes the same calls.

    Args:
        directory: where the steps are kept; shared by all processes.
        config: the run's config as nested dicts of JSON values, saved in every
          checkpoint. Its "model" entry must agree with the checkpoint's on restore.
        keep: how many of the newest steps are kept, at least 1.
        keep_best: how many of the steps with the lowest metric "loss" are kept too.
        may_differ: globs of config fields under "model", dotted, that may differ on
          restore, because they do not change what the model computes, e.g.
          ("model.remat",).
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        config: dict,
        keep: int = 3,
        keep_best: int = 1,
        may_differ: Sequence[str] = (),
    ):
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least the newest step is kept.")
        self.directory = resolved(directory)
        self.config = json.loads(json.dumps(config))
        self.may_differ = tuple(may_differ)
        self.policy = NewestAndBest(keep, keep_best)
        self._manager: ocp.CheckpointManager | None = None
        self._running: int | None = None  # the step being written
        self._last: int | None = None  # the step this object wrote last

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    # Writing

    def check_writable(self) -> None:
        """Make the directory, if it is missing, and write to it.

        Raises:
            CheckpointError: that fails.
        """
        reason = None
        if jax.process_index() == 0:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                probe = self.directory / ".writable"
                probe.write_text("")
                probe.unlink()
            except OSError as error:
                reason = f"{self.directory} cannot be written: {error}."
        if reason := gather_json(reason)[0]:
            raise CheckpointError(reason)

    def save(
        self,
        step: int,
        state: Any,
        data_iterator: Any = None,
        metrics: dict | None = None,
    ) -> None:
        """Start writing `state`; return when its arrays may be changed or donated.

        Waits for a save that is still running. If that one failed, a warning says so
        and the new save takes its place; `wait` and `close` raise instead. Saving the
        step that was saved last once more does nothing.

        Args:
            step: larger than every step in the directory.
            state: pytree of arrays, sharded or not; PRNG key arrays are fine.
            data_iterator: has `get_state()`, which returns JSON values or, as grain's
              DataLoader does, bytes of JSON; or None.
            metrics: {name: number}; "loss" decides which steps are the best.

        Raises:
            CheckpointError: if this save fails at once, or if `step` is not the newest.
        """
        try:
            self.wait()
        except CheckpointError as error:
            log.warning("%s", error)
        newest = self.latest_step()
        if step == newest == self._last:
            return
        if newest is not None and step <= newest:
            raise CheckpointError(
                f"Step {step} cannot be saved: {self.directory} already holds step "
                f"{newest}, and steps only increase. Move the newer steps away to "
                "continue from an older one, or use another directory."
            )
        arrays = flatten(state)
        meta = {
            "step": step,
            "config": self.config,
            "metrics": {k: float(v) for k, v in (metrics or {}).items()},
            "data": data_positions(data_iterator),
            "arrays": describe(arrays),
        }
        words = {name: words_of(x) for name, x in arrays.items()}
        for name, value in digests(words).items():
            meta["arrays"][name]["digest"] = value
        self._last = self._running = step
        try:
            manager = self._open()
            self.policy.losses[step] = meta["metrics"].get("loss", math.inf)
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(without_empty(words)),
                    meta=ocp.args.JsonSave(sealed(meta)),
                ),
                force=True,  # ignores orbax's own rule for skipping a save
            )
        except Exception as error:
            failure = self._abandon(error)
            if isinstance(error, OSError) or disk_is_full(error):
                raise failure from error
            raise

    def wait(self) -> None:
        """Return when no save is running.

        Raises:
            CheckpointError: if the running save failed.
        """
        if self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._abandon(error) from error
        self._running = None

    def close(self) -> None:
        """Wait for a running save and release orbax's threads."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _open(self) -> ocp.CheckpointManager:
        silence_echoes()
        if self._manager is None:
            self.policy.losses = {
                step: self._loss(step) for step in complete_steps(self.directory)
            }
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self.policy,
                cleanup_tmp_directories=True,
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        return self._manager

    def _loss(self, step: int) -> float:
        try:
            return self._meta(step)["metrics"].get("loss", math.inf)
        except (OSError, ValueError):  # restore is where damage is reported
            return math.inf

    def _abandon(self, error: Exception) -> CheckpointError:
        """Remove what the failed save wrote; return the error that says so."""
        step, manager = self._running, self._manager
        self._running = self._manager = None
        if manager is not None:
            try:
                manager.close()
            except Exception as again:  # orbax raises the same failure once more
                log.debug("While closing after a failed save: %s", again)
        if jax.process_index() == 0:
            remove_unfinished(self.directory, step)
        newest = self.latest_step()
        last = (
            "There is no complete checkpoint"
            if newest is None
            else f"The last complete checkpoint is step {newest}"
        )
        if disk_is_full(error):
            reason = "the disk is full"
            cure = "Free some space there, keep fewer checkpoints, or use another disk"
        else:
            reason = f"{type(error).__name__}: {first_line(error)}"
            cure = "Make the directory writable"
        return CheckpointError(
            f"Step {step} could not be saved in {self.directory}: {reason}. {last}; "
            f"what was written of step {step} is removed. {cure}, then save again."
        )

    # Reading

    def latest_step(self) -> int | None:
        """The newest complete step on disk; a running save does not count."""
        return max(complete_steps(self.directory), default=None)

    def load_config(self, step: int | None = None) -> dict:
        """Return the config saved with `step`, or with the newest readable step.

        A config that an earlier version saved is returned as this version saves it.

        Raises:
            CheckpointError: if there is no such step or its metadata is damaged.
        """
        steps = (
            sorted(complete_steps(self.directory), reverse=True)
            if step is None
            else [step]
        )
        failures = []
        for candidate in steps:
            try:
                return updated(self._meta(candidate)["config"])
            except (OSError, ValueError) as error:
                failures.append((candidate, first_line(error)))
        raise self._none_usable(failures)

    def restore(
        self,
        abstract_state: Any,
        data_iterator: Any = None,
        *,
        step: int | None = None,
        subtree: str = "",
    ) -> tuple[int, Any]:
        """Read the newest complete checkpoint onto the shardings asked for.

        A damaged step is moved to `corrupt-<step>` and the one before it is used;
        a step that is asked for by number is used or refused.

        Args:
            abstract_state: pytree of ShapeDtypeStructs with shardings; the mesh may
              differ from the one the checkpoint was written on.
            data_iterator: has `set_state`; it is moved to the saved position.
            step: the only step to use; None takes the newest usable one.
            subtree: dotted name of the part of the saved state that abstract_state
              describes, e.g. "params"; by default the whole state.

        Returns:
            (step, state) with state shaped like abstract_state.

        Raises:
            CheckpointError: if there is no usable checkpoint, or if it belongs to
              another model; the message says which fields and arrays differ.
        """
        self.wait()
        targets = flatten(abstract_state, prefix=subtree)
        steps = complete_steps(self.directory)
        if step is not None:
            steps = [s for s in steps if s == step]
        failures = []
        while (candidate := from_process_0(max(steps, default=-1))) >= 0:
            meta, arrays, reason = self._read(candidate, targets, subtree)
            if reason is None:
                if failures:
                    move_aside(self.directory, failures, candidate)
                    self.close()  # orbax lists the steps anew at the next save
                if data_iterator is not None:
                    set_position(data_iterator, meta["data"], candidate)
                leaves = [keys_of(arrays[name], x) for name, x in targets.items()]
                structure = jax.tree.structure(abstract_state)
                return candidate, jax.tree.unflatten(structure, leaves)
            failures.append((candidate, reason))
            steps = [s for s in steps if s < candidate]
        raise self._none_usable(failures, step)

    def _read(
        self, step: int, targets: dict, subtree: str
    ) -> tuple[dict, dict, str | None]:
        """Return the metadata, the arrays, and what is wrong with them, or None.

        Every process returns the same. Damaged bytes may raise any error in the
        libraries that parse them, so all errors count as damage, except for those
        that certainly have another cause, which are raised.
        """
        meta, arrays, reason = {}, {}, None
        stored: dict[str, str] = {}  # names in the checkpoint, by the present ones
        try:
            meta = self._meta(step)
            stored = {
                name if name in targets else present_name(name): name
                for name in meta["arrays"]
            }
            meta["arrays"] = {now: meta["arrays"][old] for now, old in stored.items()}
        except (FileNotFoundError, ValueError) as error:
            reason = first_line(error)
        if (reason := first_reason(reason)) is not None:
            return meta, arrays, reason
        check_same_model(
            f"Step {step} in {self.directory}",
            meta,
            targets,
            subtree,
            config=self.config,
            may_differ=self.may_differ,
        )
        try:
            wanted = {stored[name]: x for name, x in targets.items()}
            arrays = read_arrays(self.directory / str(step) / "state", wanted)
            arrays = {name: arrays[stored[name]] for name in targets}
        except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            reason = f"its arrays cannot be read: {first_line(error)}"
        # Before the digests, which all processes compute together.
        if (reason := first_reason(reason)) is not None:
            return meta, arrays, reason
        if damaged := damaged_arrays(meta, arrays):
            reason = (
                f"the array {damaged[0]} does not have the digest it was saved with"
            )
        return meta, arrays, first_reason(reason)

    def _meta(self, step: int) -> dict:
        return read_meta(self.directory / str(step))

    def _none_usable(
        self, failures: list[tuple[int, str]], step: int | None = None
    ) -> CheckpointError:
        if failures:
            reasons = "; ".join(f"step {s}: {reason}" for s, reason in failures)
            return CheckpointError(
                f"No usable checkpoint in {self.directory}: {reasons}. Nothing was "
                "moved or removed; restore another step by its number, or start "
                "again in another directory."
            )
        if step is None:
            return CheckpointError(f"There is no checkpoint in {self.directory}.")
        return CheckpointError(
            f"There is no complete checkpoint of step {step} in {self.directory}; it "
            f"holds the steps {sorted(complete_steps(self.directory)) or 'none'}."
        )
