"""Checks of what `forward` and `step` of a mixer are given.

They read shapes, dtypes and names, which are known while a function is traced, and
never a value.
"""

import sys
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_forward(
    params: Any,
    x: jax.Array,
    cfg: Any,
    state: Any = None,
    segment_ids: jax.Array | None = None,
) -> None:
    """Check the arguments of the `forward` of the mixer to which `cfg` belongs.

    Args:
        params: the weights, by the names of the mixer's `spec`.
        x: the input, ``[batch, time, width]``.
        cfg: the mixer's Config.
        state: the caller's state, or None.
        segment_ids: integers ``[batch, time]``, or None.

    Raises:
        ValueError: x or segment_ids has another shape or no tokens; a weight or an
            array of the state is missing, superfluous or of another shape; the message
            names it.
        TypeError: x is not an array of floating-point numbers, or segment_ids not one
            of integers.
    """
    mixer = sys.modules[type(cfg).__module__]
    _check_input(x, ("batch", "time"), mixer, cfg, "forward")
    if 0 in x.shape:
        raise ValueError(
            f"{_name(mixer)}.forward has an x of shape {x.shape}, without a token; "
            "leave out the call for an empty sequence: its state is the one before."
        )
    if segment_ids is not None:
        _check_array("segment_ids", segment_ids, jnp.integer, "integers")
        if segment_ids.shape != x.shape[:2]:
            raise ValueError(
                f"segment_ids have shape {segment_ids.shape}, but must have one number "
                f"for each token of x, [batch, time] = {x.shape[:2]}."
            )
    _check_weights(params, mixer, cfg)
    if state is not None:
        _check_state(state, mixer, cfg, x.shape[0])


def check_step(params: Any, x: jax.Array, cfg: Any, state: Any) -> None:
    """Check the arguments of `step`: an x of [batch, width] and a state."""
    mixer = sys.modules[type(cfg).__module__]
    _check_input(x, ("batch",), mixer, cfg, "step")
    if state is None:
        raise ValueError(
            f"{_name(mixer)}.step needs a state, but it is None; begin with "
            f"{_name(mixer)}.init_state(cfg, {x.shape[0]}, max_length)."
        )
    _check_weights(params, mixer, cfg)
    _check_state(state, mixer, cfg, x.shape[0])


def _check_array(name: str, x: Any, kind: Any, numbers: str) -> None:
    if not isinstance(x, jax.Array | np.ndarray):
        raise TypeError(f"{name} is a {type(x).__name__}, but must be an array.")
    if not jnp.issubdtype(x.dtype, kind) or x.dtype == jnp.float16:
        raise TypeError(f"{name} has dtype {x.dtype}, but must hold {numbers}.")


def _check_input(x, axes, mixer: ModuleType, cfg, function):
    _check_array("x", x, jnp.floating, "float32 or bfloat16 numbers")
    if x.ndim != len(axes) + 1 or x.shape[-1] != cfg.width:
        raise ValueError(
            f"{_name(mixer)}.{function} takes x of shape [{', '.join(axes)}, "
            f"width={cfg.width}], but it has {x.shape}; `forward` takes whole "
            "sequences and `step` a token a row."
        )


def _check_weights(params, mixer: ModuleType, cfg):
    """Check the names of all weights, and the shapes of those that are plain arrays."""
    specs = mixer.spec(cfg)
    remedy = f"draw them by jaxlab.params.init({_name(mixer)}.spec(cfg), key)"
    for name in specs | dict(params):
        if (name in specs) != (name in params):
            has, needs = (
                ("lack", "needs") if name in specs else ("have", "has no place for")
            )
            raise ValueError(
                f"The weights {has} {name!r}, which {_name(mixer)}.Config {needs} with "
                f"these settings; {remedy}."
            )
        shape = getattr(params[name], "shape", specs[name].shape)
        if shape != specs[name].shape:
            raise ValueError(
                f"The weight {name!r} has shape {shape}, but {cfg!r} needs "
                f"{specs[name].shape}; {remedy}."
            )


def _check_state(state, mixer: ModuleType, cfg, batch):
    max_length = getattr(state, "max_length", 0)  # the caller chose it

    def shapes(tree):
        return {
            jax.tree_util.keystr(path).lstrip("."): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    given = shapes(state)
    needed = shapes(jax.eval_shape(lambda: mixer.init_state(cfg, batch, max_length)))
    for name, shape in needed.items():
        if shape[:1] != (batch,):
            raise ValueError(
                f"{_name(mixer)}.init_state makes {name} of shape {shape} for a batch "
                f"of {batch}, but every array of a state begins with the batch."
            )
    for name in needed | given:
        if given.get(name) != needed.get(name):
            raise ValueError(
                f"The state has {name} of shape {given.get(name)}, but the Config and "
                f"the batch need {needed.get(name)}. It belongs to another Config or "
                f"batch; make one with {_name(mixer)}.init_state(cfg, {batch}, "
                "max_length)."
            )


def _name(mixer: ModuleType) -> str:
    """The name of the mixer's module, without the packages."""
    return mixer.__name__.rpartition(".")[2]
