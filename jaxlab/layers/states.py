"""Checks of what `forward` and `step` of a mixer are given."""

from collections.abc import Callable
from typing import Any

import jax


def check_forward(
    x: jax.Array,
    state: Any,
    init_state: Callable,
    cfg: Any,
    max_length: int | None = None,
) -> None:
    """Check the arguments of a mixer's `forward`: x [B, T, width], and any state.

    Args:
        x: the input.
        state: the caller's state, or None.
        init_state: the mixer's.
        cfg: the mixer's Config.
        max_length: for which the state was made, where its shape depends on it.

    Raises:
        ValueError: x has another shape, or an array of the state is missing,
            superfluous or of another shape; the message names it.
    """
    _check_input(x, ("batch", "time"), init_state, cfg, "forward")
    if state is not None:
        _check_state(state, init_state, cfg, x.shape[0], max_length)


def check_step(
    x: jax.Array,
    state: Any,
    init_state: Callable,
    cfg: Any,
    max_length: int | None = None,
) -> None:
    """Check the arguments of `step`, x [B, width] and a state, as `check_forward`."""
    _check_input(x, ("batch",), init_state, cfg, "step")
    if state is None:
        raise ValueError(
            f"{_name(init_state)}.step needs a state, but it is None; begin with "
            f"{_name(init_state)}.init_state(cfg, {x.shape[0]}, max_length)."
        )
    _check_state(state, init_state, cfg, x.shape[0], max_length)


def _check_input(x, axes, init_state, cfg, function):
    if x.ndim != len(axes) + 1 or x.shape[-1] != cfg.width:
        raise ValueError(
            f"{_name(init_state)}.{function} takes x of shape [{', '.join(axes)}, "
            f"width={cfg.width}], but it has {x.shape}; `forward` takes whole "
            "sequences and `step` a token a row."
        )


def _check_state(state, init_state, cfg, batch, max_length):
    def shapes(tree):
        return {
            jax.tree_util.keystr(path).lstrip("."): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    given = shapes(state)
    needed = shapes(jax.eval_shape(lambda: init_state(cfg, batch, max_length)))
    for name in needed | given:
        if given.get(name) != needed.get(name):
            raise ValueError(
                f"The state has {name} of shape {given.get(name)}, but the Config and "
                f"the batch need {needed.get(name)}. It belongs to another Config or "
                f"batch; make one with {_name(init_state)}.init_state(cfg, {batch}, "
                "max_length)."
            )


def _name(init_state):
    """The name of the mixer's module."""
    return init_state.__module__.rpartition(".")[2]
