"""SwiGLU: a feed-forward layer with gated hidden units.

    y = (silu(x W_gate) * (x W_up)) W_down

Reference: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.

Dimension key: d width, F hidden units.
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float

from jaxlab.params import ParamSpec, linear


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a SwiGLU layer."""

    width: int  # the model's width
    hidden: int | None = None  # None: 8/3 of the width, rounded up to a multiple of 32

    def __post_init__(self):
        for name in ("width", "hidden"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name}={size} must be at least 1.")

    @property
    def F(self) -> int:
        return self.hidden or -(-8 * self.width // 3 // 32) * 32


def spec(cfg: Config) -> dict[str, ParamSpec]:
    """The parameters of the layer."""
    return {
        "w_gate": ParamSpec((cfg.width, cfg.F), ("width", "hidden")),
        "w_up": ParamSpec((cfg.width, cfg.F), ("width", "hidden")),
        "w_down": ParamSpec((cfg.F, cfg.width), ("hidden", "width")),
    }


def forward(
    params: Any, x: Float[Array, "*rows d"], cfg: Config
) -> Float[Array, "*rows d"]:
    """Return the layer's output for each row of `x`, in the dtype of `x`."""
    gate = jax.nn.silu(linear(x, params["w_gate"]))
    return linear(gate * linear(x, params["w_up"]), params["w_down"])
