"""Feed-forward layers: one method, one file, the mixers' contract without a state.

    Config                                             frozen dataclass, width first
    spec(cfg) -> dict of ParamSpec
    forward(params, x [..., width], cfg) -> y          each row by itself

and, where training needs a loss of the layer's own (already weighted), one more:

    auxiliary_loss(params, x [B,T,width], cfg, *, segment_ids=None) -> scalar

A layer is found by the class of its config (`feedforward_of`), so one in a file of the
user's works in a model like those of this package.
"""

from types import ModuleType
from typing import Any

from jaxlab.feedforward import swiglu
from jaxlab.layers.contract import module_of


def feedforward_of(cfg: Any) -> ModuleType:
    """The module that defines the class of `cfg`, with the layer's functions.

    Raises:
        TypeError: the module lacks one of the contract's functions; names it.
    """
    return module_of(cfg, ("spec", "forward"), "feed-forward layer")


__all__ = ["feedforward_of", "swiglu"]
