"""Feed-forward layers: one file for each, with the mixers' contract without a state.

    Config                                             frozen dataclass, width first
    spec(cfg) -> dict of ParamSpec
    forward(params, x [..., width], cfg) -> y          each row on its own

and one more for a layer that adds a loss of its own (already weighted) in training:

    auxiliary_loss(params, x [B,T,width], cfg, *, segment_ids=None) -> scalar

The class of its config identifies a layer (`feedforward_of`), so a layer in a user's
own file works in a model like those of this package.
"""

from types import ModuleType
from typing import Any

from jaxlab.feedforward import swiglu
from jaxlab.layers.contract import module_of


def feedforward_of(cfg: Any) -> ModuleType:
    """Return the module that defines the class of `cfg`, with the layer's functions.

    Raises:
        TypeError: one of the contract's functions is missing; names it.
    """
    return module_of(cfg, ("spec", "forward"), "feed-forward layer")


__all__ = ["feedforward_of", "swiglu"]
