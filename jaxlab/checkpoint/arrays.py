"""The arrays of a state under their names, in the form in which they are stored."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Array

RENAMED = {"lacks": "deviations"}
"""Parts of the names of arrays in older checkpoints, mapped to the present ones."""


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return {dotted path: leaf}; Python numbers become arrays."""
    flat = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        parts = (prefix, jax.tree_util.keystr(path, simple=True, separator="."))
        name = ".".join(part for part in parts if part)
        if name in flat:
            raise ValueError(f"Two arrays of the state are both named {name!r}.")
        flat[name] = leaf if hasattr(leaf, "shape") else jnp.asarray(leaf)
    return flat


def describe(arrays: dict[str, Any]) -> dict[str, dict]:
    """The shape and dtype of each array, as JSON values."""
    return {
        name: {"shape": list(x.shape), "dtype": str(x.dtype)}
        for name, x in arrays.items()
    }


def present_name(name: str) -> str:
    """The name of an array in this version, by that in a checkpoint of any version."""
    return ".".join(RENAMED.get(part, part) for part in name.split("."))


def words_of(x: Array) -> Array:
    """Return what is stored of an array: of PRNG keys their words."""
    return jax.random.key_data(x) if _is_key(x) else x


def keys_of(words: Array, like: Any) -> Array:
    """Invert `words_of` for an array like `like`."""
    if not _is_key(like):
        return words
    implementation = jax.random.key_impl(jnp.empty((), like.dtype))
    return jax.random.wrap_key_data(words, impl=implementation)


def without_empty(arrays: dict[str, Any]) -> dict[str, Any]:
    """Leave out the arrays of size zero, which orbax refuses."""
    return {name: x for name, x in arrays.items() if math.prod(x.shape) > 0}


def read_arrays(directory: epath.Path, targets: dict[str, Any]) -> dict[str, Array]:
    """Read the named arrays onto their shardings.

    The handler is used without its checkpointer, which ends with a barrier: if one
    process finds its part damaged, the others must not wait there for ever.

    Args:
        directory: the item `state` of a step.
        targets: the shape, dtype and sharding of each array to read, by name.
    """
    stored_form = {}
    for name, x in targets.items():
        words = jax.eval_shape(words_of, jax.ShapeDtypeStruct(x.shape, x.dtype))
        sharding = x.sharding or jax.sharding.SingleDeviceSharding(
            jax.local_devices()[0]
        )
        stored_form[name] = jax.ShapeDtypeStruct(
            words.shape, words.dtype, sharding=sharding
        )
    stored = without_empty(stored_form)
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
        for name, x in stored_form.items()
        if name not in stored
    }
    return arrays | empty


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
