"""The gated feed-forward layer."""

from typing import Any

import jax
from jaxtyping import Array, Float

from jaxlab.params import ParamSpec, linear


def swiglu_spec(width: int, hidden: int) -> dict[str, ParamSpec]:
    """Parameters of `swiglu`."""
    return {
        "w_gate": ParamSpec((width, hidden), ("width", "hidden")),
        "w_up": ParamSpec((width, hidden), ("width", "hidden")),
        "w_down": ParamSpec((hidden, width), ("hidden", "width")),
    }


def swiglu(params: Any, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
    """``(silu(x W_gate) * (x W_up)) W_down``.

    Reference: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.
    """
    gate = jax.nn.silu(linear(x, params["w_gate"]))
    return linear(gate * linear(x, params["w_up"]), params["w_down"])
