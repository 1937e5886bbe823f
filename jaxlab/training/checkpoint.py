"""Checkpoints: atomic, asynchronous, verified. The only file that touches orbax.

A checkpoint is one directory, `<directory>/<step>`, that orbax writes under a
temporary name and renames once complete. It holds two items:

  state   the arrays, flattened to {"params.embed.weight": array, ...}
  meta    one JSON file: the run's config, the metrics, the position of the data
          iterator of every process, and the shape, dtype and digest of every array

The digests do not depend on how an array is sharded, so a checkpoint is verified
after a restore onto any mesh.
"""

import contextlib
import errno
import hashlib
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath  # pathlib for file systems and buckets, orbax's own
from jax.experimental import multihost_utils
from jaxtyping import Array

from jaxlab.config import differences, updated
from jaxlab.training.digest import digests

TEMPORARY = ".orbax-checkpoint-tmp"
SHOWN = 8  # differences listed in one message

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none fits what was asked for."""


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
        may_differ: dotted names of config fields under "model" that do not change
          the function the model computes, e.g. ("model.remat",).
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
        bucket = "://" in str(directory)
        self.directory = (
            epath.Path(directory) if bucket else epath.Path(directory).absolute()
        )
        self.config = json.loads(json.dumps(config))
        self.may_differ = tuple(may_differ)
        self.policy = _NewestAndBest(keep, keep_best)
        self._manager: ocp.CheckpointManager | None = None
        self._running: int | None = None  # the step being written
        self._last: int | None = None  # the step this object wrote last

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    # Writing

    def save(
        self,
        step: int,
        state: Any,
        data_iterator: Any = None,
        metrics: dict | None = None,
    ) -> None:
        """Start writing `state`; returns when the arrays may be changed or donated.

        A save that is still running is waited for. If it failed, a warning says so
        and this one takes its place; `wait` and `close` raise instead. Saving again
        the step that was saved last does nothing.

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
        arrays = _flatten(state)
        meta = {
            "step": step,
            "config": self.config,
            "metrics": {k: float(v) for k, v in (metrics or {}).items()},
            "data": _data_positions(data_iterator),
            "arrays": _describe(arrays),
        }
        words = {name: _words_of(x) for name, x in arrays.items()}
        for name, value in digests(words).items():
            meta["arrays"][name]["digest"] = value
        self._last = self._running = step
        try:
            manager = self._open()
            self.policy.losses[step] = meta["metrics"].get("loss", math.inf)
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(_without_empty(words)),
                    meta=ocp.args.JsonSave(_sealed(meta)),
                ),
                force=True,  # orbax's own rule for skipping a save is not asked
            )
        except Exception as error:
            failure = self._abandon(error)
            if isinstance(error, OSError) or _disk_is_full(error):
                raise failure from error
            raise

    def wait(self) -> None:
        """Return when no save is running; raises CheckpointError if one failed."""
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
        if self._manager is None:
            self.policy.losses = {step: self._loss(step) for step in self._steps()}
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
        """Clear away the failed save, so that a later one starts afresh."""
        step, manager = self._running, self._manager
        self._running = self._manager = None
        if manager is not None:
            try:
                manager.close()
            except Exception as again:  # orbax raises the same failure once more
                log.debug("While closing after a failed save: %s", again)
        if jax.process_index() == 0:
            _remove_unfinished(self.directory, step)
        newest = self.latest_step()
        last = (
            "There is no complete checkpoint"
            if newest is None
            else f"The last complete checkpoint is step {newest}"
        )
        if _disk_is_full(error):
            reason = "the disk is full"
            cure = "Free some space there, keep fewer checkpoints, or use another disk"
        else:
            reason = f"{type(error).__name__}: {_first_line(error)}"
            cure = "Make the directory writable"
        return CheckpointError(
            f"Step {step} could not be saved in {self.directory}: {reason}. {last}; "
            f"what was written of step {step} is removed. {cure}, then save again."
        )

    # Reading

    def latest_step(self) -> int | None:
        """The newest complete step on disk, without a save that is still running."""
        return max(self._steps(), default=None)

    def load_config(self, step: int | None = None) -> dict:
        """The config saved with `step`, by default with the newest readable step.

        One that an earlier version saved is given as this one would save it.

        Raises:
            CheckpointError: if there is no such step or its metadata is damaged.
        """
        steps = sorted(self._steps(), reverse=True) if step is None else [step]
        failures = []
        for candidate in steps:
            try:
                return updated(self._meta(candidate)["config"])
            except (OSError, ValueError) as error:
                failures.append((candidate, _first_line(error)))
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
            step: this step and no other.
            subtree: dotted name of the part of the saved state that abstract_state
              describes, e.g. "params"; by default the whole state.

        Returns:
            (step, state) with state shaped like abstract_state.

        Raises:
            CheckpointError: if there is no usable checkpoint, or if it belongs to
              another model (which fields and arrays differ is said).
        """
        self.wait()
        wanted = _flatten(abstract_state, prefix=subtree)
        steps = self._steps()
        if step is not None:
            steps = [s for s in steps if s == step]
        failures = []
        while (candidate := _from_process_0(max(steps, default=-1))) >= 0:
            meta, arrays, reason = self._read(candidate, wanted, subtree)
            if reason is None:
                self._move_aside(failures, candidate)
                if data_iterator is not None:
                    _set_position(data_iterator, meta["data"], candidate)
                leaves = [_keys_of(arrays[name], x) for name, x in wanted.items()]
                structure = jax.tree.structure(abstract_state)
                return candidate, jax.tree.unflatten(structure, leaves)
            failures.append((candidate, reason))
            steps = [s for s in steps if s < candidate]
        raise self._none_usable(failures, step)

    def _read(
        self, step: int, wanted: dict, subtree: str
    ) -> tuple[dict, dict, str | None]:
        """(meta, arrays, what is wrong with them or None), the same on every process.

        The bytes may be anything, and so may the errors of the libraries that parse
        them; what is surely not damage is raised.
        """
        meta, arrays, reason = {}, {}, None
        try:
            meta = self._meta(step)
        except (FileNotFoundError, ValueError) as error:
            reason = _first_line(error)
        if (reason := _first_reason(reason)) is not None:
            return meta, arrays, reason
        self._check_same_model(step, meta, wanted, subtree)
        try:
            arrays = _read_arrays(self.directory / str(step) / "state", wanted)
        except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            reason = f"its arrays cannot be read: {_first_line(error)}"
        # Before the digests, which all processes compute together.
        if (reason := _first_reason(reason)) is not None:
            return meta, arrays, reason
        found = digests(arrays).items()
        wrong = [name for name, d in found if d != meta["arrays"][name]["digest"]]
        if wrong:
            reason = f"the array {wrong[0]} does not have the digest it was saved with"
        return meta, arrays, _first_reason(reason)

    def _meta(self, step: int) -> dict:
        """The step's metadata. Raises OSError or ValueError if it is damaged."""
        path = self.directory / str(step) / "meta" / "metadata"
        try:
            return _unsealed(json.loads(path.read_text()))
        except FileNotFoundError:
            raise FileNotFoundError("its metadata file is missing") from None
        except (ValueError, KeyError, TypeError):
            raise ValueError("its metadata file is damaged") from None

    def _check_same_model(
        self, step: int, meta: dict, wanted: dict, subtree: str
    ) -> None:
        def shown(arrays: dict[str, dict]) -> dict[str, str]:
            return {name: f"{x['dtype']}{x['shape']}" for name, x in arrays.items()}

        labels = ("in the checkpoint", "now")
        part = {
            name: x
            for name, x in meta["arrays"].items()
            if f"{name}.".startswith(f"{subtree}." if subtree else "")
        }
        arrays = differences(shown(part), shown(_describe(wanted)), labels)
        fields = differences(updated(meta["config"]), self.config, labels)
        names = {field: field.partition(": ")[0] for field in fields}
        of_model = [
            field
            for field, name in names.items()
            if f"{name}.".startswith("model.") and name not in self.may_differ
        ]
        if not arrays and not of_model:
            return
        config = "the same, so the code that builds the state has changed"
        arrays_or_none = f" Arrays: {_list(arrays)}." if arrays else ""
        raise CheckpointError(
            f"Step {step} in {self.directory} belongs to another model. Config: "
            f"{_list(fields if arrays else of_model) or config}.{arrays_or_none} Use "
            "the checkpoint's config (load_config returns it), or another directory "
            "for this model."
        )

    def _move_aside(self, failures: list[tuple[int, str]], used: int) -> None:
        if not failures:
            return
        if jax.process_index() == 0:
            for step, reason in failures:
                aside = _free_name(self.directory, f"corrupt-{step}")
                (self.directory / str(step)).rename(aside)
                log.warning(
                    "Step %d in %s is damaged: %s. It has been moved to %s, and step "
                    "%d is used instead.",
                    *(step, self.directory, reason, aside.name, used),
                )
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("jaxlab-checkpoint-move-aside")
        self.close()  # orbax keeps a list of steps; the next save reads it anew

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
            f"holds the steps {sorted(self._steps()) or 'none'}."
        )

    def _steps(self) -> list[int]:
        if not self.directory.is_dir():
            return []
        return ocp.utils.checkpoint_steps(self.directory)


class _NewestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the newest `keep` steps and the `keep_best` of lowest loss.

    orbax's own BestN reads a separate metrics file when the manager is made and
    fails there if it is damaged; the losses here come from the metadata.
    """

    def __init__(self, keep: int, keep_best: int):
        self.keep = keep
        self.keep_best = keep_best
        self.losses: dict[int, float] = {}

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        rated = [s for s in steps if math.isfinite(self.losses.get(s, math.inf))]
        best = sorted(rated, key=lambda s: self.losses[s])[: self.keep_best]
        return [s in best or s in steps[-self.keep :] for s in steps]


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted path: leaf}; Python numbers become arrays."""
    flat = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        parts = (prefix, jax.tree_util.keystr(path, simple=True, separator="."))
        name = ".".join(part for part in parts if part)
        if name in flat:
            raise ValueError(f"Two arrays of the state are both named {name!r}.")
        flat[name] = leaf if hasattr(leaf, "shape") else jnp.asarray(leaf)
    return flat


def _describe(arrays: dict[str, Any]) -> dict[str, dict]:
    return {
        name: {"shape": list(x.shape), "dtype": str(x.dtype)}
        for name, x in arrays.items()
    }


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _words_of(x: Array) -> Array:
    """What is stored of an array: a PRNG key array as its words."""
    return jax.random.key_data(x) if _is_key(x) else x


def _keys_of(words: Array, like: Any) -> Array:
    """The inverse of `_words_of` for an array like `like`."""
    if not _is_key(like):
        return words
    implementation = jax.random.key_impl(jnp.empty((), like.dtype))
    return jax.random.wrap_key_data(words, impl=implementation)


def _without_empty(arrays: dict[str, Any]) -> dict[str, Any]:
    """orbax refuses arrays of size zero."""
    return {name: x for name, x in arrays.items() if math.prod(x.shape) > 0}


def _read_arrays(directory: epath.Path, wanted: dict[str, Any]) -> dict[str, Array]:
    """The named arrays on their shardings.

    The handler is used without its checkpointer, which ends with a barrier: if one
    process finds its part damaged, the others must not wait there for ever.
    """
    target = {}
    for name, x in wanted.items():
        words = jax.eval_shape(_words_of, jax.ShapeDtypeStruct(x.shape, x.dtype))
        sharding = x.sharding or jax.sharding.SingleDeviceSharding(
            jax.local_devices()[0]
        )
        target[name] = jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=sharding)
    stored = _without_empty(target)
    arrays = ocp.PyTreeCheckpointHandler().restore(
        directory,
        args=ocp.args.PyTreeRestore(
            stored,
            restore_args=ocp.checkpoint_utils.construct_restore_args(stored),
            partial_restore=True,
        ),
    )
    empty = {
        name: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding)
        for name, x in target.items()
        if name not in stored
    }
    return arrays | empty


def _data_positions(data_iterator: Any) -> list | None:
    """The position of every process's iterator, on every process."""
    if data_iterator is None:
        return None
    position = data_iterator.get_state()
    if isinstance(position, bytes):
        position = {"bytes": position.decode()}
    text = json.dumps(position).encode()
    if jax.process_count() == 1:
        return [json.loads(text)]
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.frombuffer(text.ljust(int(lengths.max())), np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row.tobytes()) for row in rows]


def _set_position(data_iterator: Any, positions: list | None, step: int) -> None:
    if positions is None:
        raise CheckpointError(
            f"Step {step} was saved without a data iterator, so there is no position "
            "to restore; pass no data_iterator to start the data from its beginning."
        )
    if len(positions) != jax.process_count():
        raise CheckpointError(
            f"Step {step} holds the data positions of {len(positions)} processes and "
            f"this run has {jax.process_count()}, each of which would read another "
            "part of the data. Use as many processes, or pass no data_iterator to "
            "start the data from its beginning."
        )
    position = positions[jax.process_index()]
    if isinstance(position, dict) and position.keys() == {"bytes"}:
        position = position["bytes"].encode()
    data_iterator.set_state(position)


def _sealed(meta: dict) -> dict:
    """Metadata with the hash of itself, in the form it has after a trip to JSON."""
    meta = json.loads(json.dumps(meta))
    return {"meta": meta, "sha256": _sha256(meta)}


def _unsealed(sealed: dict) -> dict:
    if _sha256(sealed["meta"]) != sealed["sha256"]:
        raise ValueError("wrong hash")
    return sealed["meta"]


def _sha256(meta: dict) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _from_process_0(value: int) -> int:
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _first_reason(reason: str | None) -> str | None:
    """This process's reason, or that another process has one, or None everywhere."""
    if jax.process_count() == 1:
        return reason
    bad = multihost_utils.process_allgather(np.bool_(reason is not None))
    if reason is None and bad.any():
        return f"process {int(np.argmax(bad))} could not read its part"
    return reason


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error, however often it was wrapped."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "RESOURCE_EXHAUSTED" in str(
            error
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _remove_unfinished(directory: epath.Path, step: int | None) -> None:
    """Remove the temporary directory of a failed save.

    The threads that write the other arrays notice the failure a little later and may
    put files back; what outlives these attempts is removed before the next save.
    """
    for _ in range(20):
        for path in directory.glob(f"{step}{TEMPORARY}*"):
            with contextlib.suppress(OSError):
                path.rmtree()
        time.sleep(0.05)
        if not any(directory.glob(f"{step}{TEMPORARY}*")):
            return


def _free_name(directory: epath.Path, name: str) -> epath.Path:
    path, n = directory / name, 1
    while path.exists():
        n += 1
        path = directory / f"{name}-{n}"
    return path


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else f"{lines[0][:200]}..."


def _list(items: list[str]) -> str:
    more = f"; and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return "; ".join(items[:SHOWN]) + more
