"""The names under which the classes of configs are saved.

A class of jaxlab is saved under its public name, wherever its file is: ``AdamW``, or
``gla.Config`` for the `Config` of the module `gla`. Moving a file changes no
checkpoint. Earlier versions saved the whole path, which ends in the same name. When a
class is renamed, `RENAMED` keeps its former names.

A class of your own is saved under its module and name, such as ``my_mixer.Config``, and
is looked up among the loaded modules: nothing is imported because a file names it.
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
"""Former names of jaxlab's classes, mapped to the present ones."""

CONFIG_FILE = "config_file_"
"""Prefix of a config file's module name, so that it hides no other module."""


def tag(cls: type) -> str:
    """The name under which a class is saved.

    Raises:
        TypeError: the class is nested in another class or in a function, or is your own
            and would have the name of one of jaxlab's.
    """
    name = f"{cls.__module__.removeprefix(CONFIG_FILE)}.{cls.__qualname__}"
    if "." in cls.__qualname__:
        raise TypeError(
            f"{name} is not at the top level of its module, where a saved config could "
            "find it again; define it there."
        )
    if _is_ours(cls):
        return canonical(name)
    if any(tag(known) == name for known in classes_of_jaxlab()):
        raise TypeError(
            f"{name} is the name of a class of jaxlab; rename your file "
            f"{sys.modules[cls.__module__].__file__}."
        )
    return name


def canonical(name: str) -> str:
    """The present name of a class that was saved as `name`."""
    if name.startswith("jaxlab."):
        *_, module, cls = name.split(".")
        name = f"{module}.{cls}" if cls == "Config" else cls
    return RENAMED.get(name, name)


def find(name: str) -> type:
    """The dataclass that was saved as `name`.

    Raises:
        ValueError: no loaded module and no module of jaxlab defines it; the message
            gives the nearest known name.
    """
    present = canonical(name)
    if cls := _among(_loaded(), present):
        return cls
    module, _, attribute = present.rpartition(".")
    for module_name in (module, CONFIG_FILE + module):
        thing = getattr(sys.modules.get(module_name), attribute, None)
        if _is_config_class(thing) and thing.__module__ == module_name:
            return thing
    classes = list(classes_of_jaxlab())
    if cls := _among(classes, present):
        return cls
    near = nearest(present, map(tag, classes))
    if module and not name.startswith("jaxlab."):
        raise ValueError(
            f"The saved config names {name}, which no loaded module defines{near}. If "
            "it is your own class, import its file first."
        )
    raise ValueError(
        f"This version of jaxlab has no {name}, which the saved config names{near}."
    )


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of an error message: the known name nearest to `name`, if one is near."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; the nearest is {close[0]!r}" if close else ""


def _is_ours(cls: type) -> bool:
    return cls.__module__.split(".")[0] == jaxlab.__name__


def _is_config_class(thing: object) -> TypeGuard[type]:
    """Whether `thing` is a dataclass and not a pytree: states are no configs."""
    return (
        isinstance(thing, type)
        and dataclasses.is_dataclass(thing)
        and not hasattr(thing, "_flax_dataclass")
    )


def _among(classes: Iterable[type], name: str) -> type | None:
    return next((cls for cls in classes if tag(cls) == name), None)


def _loaded() -> Iterator[type]:
    """The config classes in the loaded modules of jaxlab."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == jaxlab.__name__:
            for thing in list(vars(module).values()):
                # A module's imports are its attributes too.
                if _is_config_class(thing) and thing.__module__ == name:
                    if "." not in thing.__qualname__:
                        yield thing


def classes_of_jaxlab() -> Iterator[type]:
    """All config classes of jaxlab; imports the modules that are not loaded yet."""
    for module in pkgutil.walk_packages(jaxlab.__path__, f"{jaxlab.__name__}."):
        importlib.import_module(module.name)
    yield from _loaded()
