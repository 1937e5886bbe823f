"""The names under which saved configs know their classes.

A class of jaxlab is saved under its public name, wherever its file lies: ``AdamW``, or
``gla.Config`` for the `Config` of the module `gla`. Moving a file changes no
checkpoint. Versions before this one saved the whole path, which ends in the same name.
A class that gets another name keeps its former ones in `RENAMED`.

A class of your own is saved under its module and name, such as ``my_mixer.Config``, and
is found again among the modules that are loaded: nothing is imported because a file
names it.
"""

import dataclasses
import difflib
import importlib
import pkgutil
import sys
from collections.abc import Iterable, Iterator
from typing import TypeGuard

import jaxlab

RENAMED: dict[str, str] = {"policy.Config": "perceptron.Config"}
"""Former names of classes of jaxlab, and their present ones."""

CONFIG_FILE = "config_file_"
"""Begins the module name of a config file, so that it hides no module."""


def tag(cls: type) -> str:
    """The name under which a class is saved.

    Raises:
        TypeError: a class inside another or in a function, or one of your own whose
            name would be that of one of jaxlab's.
    """
    name = f"{cls.__module__.removeprefix(CONFIG_FILE)}.{cls.__qualname__}"
    if "." in cls.__qualname__:
        raise TypeError(
            f"{name} is not at the top level of its module, where a saved config could "
            "find it again."
        )
    if _is_ours(cls):
        return canonical(name)
    if any(tag(known) == name for known in classes_of_jaxlab()):
        raise TypeError(
            f"{name} is the name of a class of jaxlab; rename the file of yours, "
            f"{sys.modules[cls.__module__].__file__}."
        )
    return name


def canonical(name: str) -> str:
    """The present name of a class that was saved under this one."""
    if name.startswith("jaxlab."):
        *_, module, cls = name.split(".")
        name = f"{module}.{cls}" if cls == "Config" else cls
    return RENAMED.get(name, name)


def find(name: str) -> type:
    """The dataclass of a saved name.

    Raises:
        ValueError: no module that is loaded, and none of jaxlab's, defines it; the
            message says which name is near.
    """
    wanted = canonical(name)
    if cls := _among(_loaded(), wanted):
        return cls
    module, _, attribute = wanted.rpartition(".")
    for module_name in (module, CONFIG_FILE + module):
        thing = getattr(sys.modules.get(module_name), attribute, None)
        if _is_config_class(thing) and thing.__module__ == module_name:
            return thing
    classes = list(classes_of_jaxlab())
    if cls := _among(classes, wanted):
        return cls
    near = nearest(wanted, map(tag, classes))
    if module and not name.startswith("jaxlab."):
        raise ValueError(
            f"The saved config names {name}, which no module that is loaded defines"
            f"{near}. If it is a class of yours, import its file first."
        )
    raise ValueError(
        f"This version of jaxlab has no {name}, which the saved config names{near}."
    )


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a sentence that says which known name is near, if one is."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; the nearest is {close[0]!r}" if close else ""


def _is_ours(cls: type) -> bool:
    return cls.__module__.split(".")[0] == jaxlab.__name__


def _is_config_class(thing: object) -> TypeGuard[type]:
    """Whether it is a dataclass, and no pytree: states are not saved in configs."""
    return (
        isinstance(thing, type)
        and dataclasses.is_dataclass(thing)
        and not hasattr(thing, "_flax_dataclass")
    )


def _among(classes: Iterable[type], wanted: str) -> type | None:
    return next((cls for cls in classes if tag(cls) == wanted), None)


def _loaded() -> Iterator[type]:
    """The config classes of jaxlab's modules that are loaded."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == jaxlab.__name__:
            for thing in list(vars(module).values()):
                # A module's imports are its attributes too.
                if _is_config_class(thing) and thing.__module__ == name:
                    if "." not in thing.__qualname__:
                        yield thing


def classes_of_jaxlab() -> Iterator[type]:
    """All config classes of jaxlab; imports what is not loaded yet."""
    for module in pkgutil.walk_packages(jaxlab.__path__, f"{jaxlab.__name__}."):
        importlib.import_module(module.name)
    yield from _loaded()
