"""The module of a layer: the one that defines the class of the layer's config."""

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


def module_of(cfg: Any, functions: Sequence[str], kind: str) -> ModuleType:
    """The module in which the class of `cfg` is defined.

    A layer is a file that defines a Config and functions of it, so the class of a
    config leads to the functions, in the library as in a file of the user's.

    Args:
        cfg: an instance of a layer's Config.
        functions: names that the module must define.
        kind: of layer, for the message, such as "mixer".

    Raises:
        TypeError: the module does not define one of the functions; names it.
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
