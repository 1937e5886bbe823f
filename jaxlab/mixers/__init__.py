"""Sequence mixers: one method, one file, the same five functions.

    Config                                             frozen dataclass, width first
    spec(cfg) -> dict of ParamSpec
    init_state(cfg, batch, max_length) -> state        before the first token
    forward(params, x [B,T,width], cfg, *, state=None, segment_ids=None) -> (y, state)
    step(params, x [B,width], cfg, state) -> (y, state)

and, where training needs a loss of the mixer's own (already weighted), a sixth:

    auxiliary_loss(params, x [B,T,width], cfg, *, segment_ids=None) -> scalar

The contract, proven for every mixer in ``tests/mixers/test_laws.py``:

- `forward` equals a scan of `step`; without a state it starts from nothing and returns
  None for the state, with one it continues and returns the state after the last token.
- Causal: a token's output depends on itself and earlier tokens of its document.
- ``segment_ids [B,T]``: a change of id starts a new document. A given state belongs to
  the first document of each row; the state returned is that of the last. Ids below 0
  are padding at either end of a row, which touches no state.

A mixer is found by the class of its config (`mixer_of`), so one in a file of the user's
works in a model, and in the laws, like those of this package.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from jaxlab.layers.contract import module_of

MixerConfig = Any
"""A name for annotations: any config whose module `mixer_of` finds."""


def mixer_of(cfg: Any) -> ModuleType:
    """The module that defines the class of `cfg`, with the mixer's functions.

    Raises:
        TypeError: the module lacks one of the contract's functions; names it.
    """
    return module_of(cfg, ("spec", "init_state", "forward", "step"), "mixer")


def _own() -> dict[str, ModuleType]:
    names = (module.name for module in pkgutil.iter_modules(__path__))
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {
        name: module for name, module in modules.items() if "Config" in vars(module)
    }


MIXERS = _own()
"""The mixers of this package by name: its modules that define a Config."""
