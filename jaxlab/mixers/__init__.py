"""Sequence mixers: one module for each method, all with the same five definitions.

    Config                                             frozen dataclass, width first
    spec(cfg) -> dict of ParamSpec
    init_state(cfg, batch, max_length) -> state        before the first token
    forward(params, x [B,T,width], cfg, *, state=None, segment_ids=None) -> (y, state)
    step(params, x [B,width], cfg, state) -> (y, state)

and a sixth for a mixer that adds a loss of its own (already weighted) in training:

    auxiliary_loss(params, x [B,T,width], cfg, *, segment_ids=None) -> scalar

The contract, tested for every mixer in ``tests/mixers/test_laws.py``:

- `forward` equals a scan of `step`. Without a state it starts from an empty one and
  returns None for it; with a state it continues and returns the one after the last
  token.
- Causal: a token's output depends only on itself and earlier tokens of its document.
- ``segment_ids [B,T]``: a change of id starts a new document. A given state belongs to
  the first document of each row; the returned state is that of the last. Ids below 0
  mark padding at either end of a row, which leaves the state unchanged.
- With ``segment_ids``, a token that is not finite makes NaN of its output, of those
  behind it in its document and of the state if the row ends there, and of no other
  (`jaxlab.layers.contract.forward`).
- Every array of a state begins with the batch.

A Config may name, in ``may_differ``, fields that change how a result is computed but
not what it is, such as ``chunk_size``: a saved run goes on with others.

The decorators `jaxlab.layers.contract.forward` and `.step` check the arguments. For
that, a state whose shape depends on ``max_length`` has a property of that name.

The class of its config identifies a mixer (`mixer_of`), so a mixer in a user's own file
works in a model, and passes the same tests, like those of this package.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from jaxlab.layers.contract import module_of

MixerConfig = Any
"""For annotations: any config whose class is defined in a mixer's module."""


def mixer_of(cfg: Any) -> ModuleType:
    """Return the module that defines the class of `cfg`, with the mixer's functions.

    Raises:
        TypeError: one of the contract's functions is missing; names it.
    """
    return module_of(cfg, ("spec", "init_state", "forward", "step"), "mixer")


def _mixers() -> dict[str, ModuleType]:
    names = (module.name for module in pkgutil.iter_modules(__path__))
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {
        name: module for name, module in modules.items() if "Config" in vars(module)
    }


MIXERS = _mixers()
"""The mixers of this package by name: all modules that define a Config."""
