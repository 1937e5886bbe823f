"""Whether a step is what was saved, and of the model that asks for it."""

import fnmatch
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from etils import epath
from jaxtyping import Array

from jaxlab.checkpoint.arrays import describe
from jaxlab.checkpoint.digest import digests
from jaxlab.checkpoint.errors import CheckpointError
from jaxlab.config import differences, updated

SHOWN = 8  # differences listed in one message


def sealed(meta: dict) -> dict:
    """Return metadata with its own hash, in the form it has after a trip to JSON."""
    meta = json.loads(json.dumps(meta))
    return {"meta": meta, "sha256": _sha256(meta)}


def read_meta(directory: epath.Path) -> dict:
    """Read the metadata of the step in a directory.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged.
    """
    path = directory / "meta" / "metadata"
    try:
        return _unsealed(json.loads(path.read_text()))
    except FileNotFoundError:
        raise FileNotFoundError("its metadata file is missing") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError("its metadata file is damaged") from None


def _unsealed(sealed: dict) -> dict:
    if _sha256(sealed["meta"]) != sealed["sha256"]:
        raise ValueError("wrong hash")
    return sealed["meta"]


def _sha256(meta: dict) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def damaged_arrays(meta: dict, arrays: dict[str, Array]) -> list[str]:
    """The names of the arrays that do not have the digest they were saved with."""
    return [
        name
        for name, digest in digests(arrays).items()
        if digest != meta["arrays"][name]["digest"]
    ]


def check_same_model(
    place: str,
    meta: dict,
    targets: dict[str, Any],
    subtree: str,
    *,
    config: dict,
    may_differ: Sequence[str],
) -> None:
    """Check that a step was saved by the model that asks for it.

    Args:
        place: names the step and its directory in the message.
        meta: the step's metadata.
        targets: the shape and dtype of each array to read, by name.
        subtree: dotted name of the part of the saved state that `targets` are.
        config: the present config.
        may_differ: globs of the dotted names of fields under "model" that need not
            agree.

    Raises:
        CheckpointError: an array or a field of the model differs; says which.
    """

    def shown(arrays: dict[str, dict]) -> dict[str, str]:
        return {name: f"{x['dtype']}{x['shape']}" for name, x in arrays.items()}

    labels = ("in the checkpoint", "now")
    part = {
        name: x
        for name, x in meta["arrays"].items()
        if f"{name}.".startswith(f"{subtree}." if subtree else "")
    }
    arrays = differences(shown(part), shown(describe(targets)), labels)
    fields = differences(updated(meta["config"]), config, labels)
    names = {field: field.partition(": ")[0] for field in fields}
    of_model = [
        field
        for field, name in names.items()
        if f"{name}.".startswith("model.")
        and not any(fnmatch.fnmatch(name, pattern) for pattern in may_differ)
    ]
    if not arrays and not of_model:
        return
    same = "the same, so the code that builds the state has changed"
    arrays_or_none = f" Arrays: {_list(arrays)}." if arrays else ""
    raise CheckpointError(
        f"{place} belongs to another model. Config: "
        f"{_list(fields if arrays else of_model) or same}.{arrays_or_none} Use "
        "the checkpoint's config (load_config returns it), or another directory "
        "for this model."
    )


def _list(items: list[str]) -> str:
    more = f"; and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return "; ".join(items[:SHOWN]) + more
