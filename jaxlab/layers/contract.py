"""What all layers of a kind have in common: how they are found, what they promise."""

import functools
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from jaxlab.layers.checks import check_forward, check_step
from pallas_kernels.segments import Segments


def module_of(cfg: Any, functions: Sequence[str], kind: str) -> ModuleType:
    """Return the module in which the class of `cfg` is defined.

    A layer is a module that defines a Config and functions that take it, so the class
    of a config leads to the functions, in the library as well as in a user's own file.

    Args:
        cfg: an instance of a layer's Config.
        functions: names that the module must define.
        kind: what the message calls the layer, such as "mixer".

    Raises:
        TypeError: the module lacks one of the functions; the message names it.
    """
    name = type(cfg).__module__
    module = sys.modules.get(name)
    for function in functions:
        if not callable(getattr(module, function, None)):
            raise TypeError(
                f"{cfg!r} is not the Config of a {kind}: its class is defined in the "
                f"module {name}, which has no function {function!r}. The module of a "
                f"{kind} defines Config, {', '.join(functions)}."
            )
    return sys.modules[name]


def forward[F: Callable](function: F) -> F:
    """Decorate the `forward` of a mixer: check its arguments, keep documents apart.

    With ``segment_ids`` the function is given padding, and tokens with numbers that are
    not finite, as zeros. Of what it returns, padding becomes 0, and NaN is what stands
    at or behind such a token in its document; see `pallas_kernels.segments`.
    """

    @functools.wraps(function)
    def checked(params, x, cfg, *, state=None, segment_ids=None):
        check_forward(params, x, cfg, state, segment_ids)
        if segment_ids is None:
            return function(params, x, cfg, state=state)
        segments = Segments.of(segment_ids, [("BTD", x)], _floats(state))
        state = _map_floats(segments.state_before, state)
        x = segments.inputs(x, "BTD")
        y, state = function(params, x, cfg, state=state, segment_ids=segment_ids)
        return segments.outputs(y, "BTD"), _map_floats(segments.state_after, state)

    return checked  # pyright: ignore[reportReturnType]


def step[F: Callable](function: F) -> F:
    """Decorate the `step` of a mixer: check its arguments."""

    @functools.wraps(function)
    def checked(params, x, cfg, state):
        check_step(params, x, cfg, state)
        return function(params, x, cfg, state)

    return checked  # pyright: ignore[reportReturnType]


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _axes(x: jax.Array) -> str:
    """Letters for the axes of an array of a state: rows, and others."""
    return "B" + "pqrstuvw"[: x.ndim - 1]


def _floats(state: Any) -> list[tuple[str, jax.Array]]:
    return [(_axes(x), x) for x in jax.tree.leaves(state) if _is_float(x)]


def _map_floats(function: Callable, state: Any) -> Any:
    return jax.tree.map(lambda x: function(x, _axes(x)) if _is_float(x) else x, state)
