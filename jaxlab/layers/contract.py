"""Layers are found by the module that defines the class of their config."""

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


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
