"""Run configs: frozen dataclasses in Python files, overridden on a command line.

  python scripts/train.py configs/tiny.py --model.width 64

`configs/tiny.py` assigns one frozen dataclass to the name `config`; every field, at
any depth, is an option. A checkpoint keeps the same config as JSON.
"""

import ast
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import operator
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructTypeInfo,
)

SCALARS = (bool, int, float, str, type(None))


def to_json(config: Any) -> dict:
    """A dataclass as {"type": "jaxlab.module.Class", field: value, ...}.

    Args:
        config: dataclass of bools, ints, floats, strings, None, dataclasses and tuples
          of these.

    Returns:
        Dicts, lists and scalars; `from_json` gives back an equal config.

    Raises:
        TypeError: if a field holds anything else (its dotted name is said).
    """
    if not _is_config(config):
        raise TypeError(f"A config is a dataclass, and {config!r} is not one.")
    return _to_json(config, "config")


def _to_json(value: Any, where: str) -> Any:
    if _is_config(value):
        cls = type(value)
        if cls.__module__.split(".")[0] != "jaxlab" or "." in cls.__qualname__:
            raise TypeError(
                f"{where} is a {cls.__module__}.{cls.__qualname__}; a config that is "
                "written down is made of classes at the top level of modules of jaxlab."
            )
        fields = {
            field.name: _to_json(getattr(value, field.name), f"{where}.{field.name}")
            for field in dataclasses.fields(value)
        }
        return {"type": f"{cls.__module__}.{cls.__qualname__}", **fields}
    if type(value) is tuple:
        return [_to_json(item, f"{where}.{i}") for i, item in enumerate(value)]
    if type(value) in SCALARS:
        return value
    raise TypeError(
        f"{where} is {value!r}, a {type(value).__name__}; a config holds bools, ints, "
        "floats, strings, None, dataclasses and tuples of these."
    )


def from_json(data: dict) -> Any:
    """The config that `to_json` wrote; lists become tuples.

    A field that is missing takes its default, so that configs saved before the field
    was added stay readable.

    Raises:
        ValueError: a type is not a dataclass of jaxlab (nothing else is imported), or
            lacks one of the fields given, or needs one that is not.
    """
    if not isinstance(data, dict):
        raise ValueError(f"A config in JSON is an object with a type, not {data!r}.")
    return _from_json(data)


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(item) for item in value)
    if not isinstance(value, dict):
        return value
    cls = _config_type(value.get("type"))
    fields = dataclasses.fields(cls)
    names = [field.name for field in fields]
    given = [name for name in value if name != "type"]
    for name in given:
        if name not in names:
            raise ValueError(
                f"{value['type']} has no field {name!r}{_nearest(name, names)}."
            )
    for field in fields:
        no_default = field.default is field.default_factory is dataclasses.MISSING
        if no_default and field.name not in given:
            raise ValueError(f"{value['type']} needs the field {field.name!r}.")
    return cls(**{name: _from_json(value[name]) for name in given})


def _config_type(name: Any) -> type:
    module, _, cls = name.rpartition(".") if isinstance(name, str) else ("", "", "")
    if module.split(".")[0] != "jaxlab":
        raise ValueError(
            f"A config of type {name!r} is refused: only dataclasses of jaxlab are "
            "made from JSON."
        )
    try:
        found = getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError):
        raise ValueError(
            f"This version of jaxlab has no {name}, which the saved config names."
        ) from None
    # A module's imports are its attributes too; only its own dataclasses count.
    if not (
        isinstance(found, type)
        and dataclasses.is_dataclass(found)
        and found.__module__ == module
    ):
        raise ValueError(f"{name} is not a dataclass, so it is not made from JSON.")
    return found


def differences(
    a: dict, b: dict, labels: tuple[str, str] = ("in the first", "in the second")
) -> list[str]:
    """Where two configs in JSON differ: "model.width: 256 in the first, 128 in ..."."""
    return _differences(a, b, labels, "")


def _differences(a: Any, b: Any, labels: tuple[str, str], where: str) -> list[str]:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        found = []
        for name in (*a, *(name for name in b if name not in a)):
            inner = f"{where}.{name}" if where else str(name)
            pair = a.get(name, _ABSENT), b.get(name, _ABSENT)
            found += _differences(*pair, labels, inner)
        return found
    if type(a) is type(b) and (a == b or (a != a and b != b)):  # NaN equals NaN here
        return []
    return [f"{where}: {_shown(a)} {labels[0]}, {_shown(b)} {labels[1]}"]


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def _shown(value: Any) -> str:
    return str(value.get("type", value)) if isinstance(value, dict) else repr(value)


def load(path: str | Path) -> Any:
    """The value called `config` in a Python file.

    Raises:
        FileNotFoundError: if there is no such file; those beside it are listed.
        ValueError: if it has no `config`, or calls a dataclass with a field that it
          does not have.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no config file {path}. {_beside(path)}")
    name = f"config_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file; a config file ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses defined in the file look themselves up
    try:
        spec.loader.exec_module(module)
    except TypeError as error:
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        keyword = found[1] if found else ""
        where = _call_with(keyword, path, error.__traceback__)
        if where is None:
            raise
        line, cls = where
        names = [field.name for field in dataclasses.fields(cls)]
        raise ValueError(
            f"{path}, line {line}: {cls.__module__}.{cls.__qualname__} has no field "
            f"{keyword!r}{_nearest(keyword, names)}."
        ) from error
    if not hasattr(module, "config"):
        raise ValueError(
            f"{path} defines no `config`; a config file ends with `config = ...`, a "
            "frozen dataclass."
        )
    if not _is_config(module.config):
        raise ValueError(
            f"`config` in {path} is {module.config!r}; it must be a dataclass."
        )
    return module.config


def _call_with(
    keyword: str, path: Path, traceback: TracebackType | None
) -> tuple[int, type] | None:
    """The line of `keyword` in the call that failed, and the dataclass it makes."""
    namespace, line = {}, 0
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == str(path):
            frame = traceback.tb_frame
            namespace, line = frame.f_globals | frame.f_locals, traceback.tb_lineno
        traceback = traceback.tb_next
    for call in ast.walk(ast.parse(path.read_text())):
        if not isinstance(call, ast.Call):
            continue
        if not call.lineno <= line <= (call.end_lineno or call.lineno):
            continue
        # Config(...) or dataclasses.replace(config, ...)
        for node in (call.func, *call.args[:1]):
            value = _resolve(node, namespace)
            cls = value if isinstance(value, type) else type(value)
            if not dataclasses.is_dataclass(cls):
                continue
            fields = {field.name for field in dataclasses.fields(cls)}
            for given in call.keywords:
                if given.arg == keyword and keyword not in fields:
                    return given.value.lineno, cls
    return None


def _resolve(node: ast.expr, namespace: dict) -> Any:
    """The value of a name or a chain of attributes, what a call calls, or None."""
    if isinstance(node, ast.Name):
        return namespace.get(node.id)
    if isinstance(node, ast.Attribute):
        return getattr(_resolve(node.value, namespace), node.attr, None)
    if isinstance(node, ast.Call):
        return _resolve(node.func, namespace)
    return None


def parse_cli(argv: Sequence[str]) -> Any:
    """The config of a command line: a config file, then overrides of its fields.

    `parse_cli(["configs/tiny.py", "--model.width", "64"])`. A field in a tuple is
    named by its index: `--model.pattern.0.n-householders 2`. Ends the program with
    code 2 and a sentence if an option or the file is wrong, with code 0 after --help.

    Args:
        argv: the arguments, without the program's name (`sys.argv[1:]`).
    """
    program = Path(sys.argv[0]).name
    usage = f"usage: {program} CONFIG.py [--field value ...]"
    if not argv or argv[0].startswith("-"):
        help_wanted = any(argument in ("-h", "--help") for argument in argv)
        print(
            f"{usage}\n`{program} CONFIG.py --help` lists the fields of a config.",
            file=sys.stdout if help_wanted else sys.stderr,
        )
        raise SystemExit(0 if help_wanted else 2)
    try:
        default = load(argv[0])
    except (FileNotFoundError, ValueError) as error:
        print(f"{usage}\n{error}", file=sys.stderr)
        raise SystemExit(2) from error
    return tyro.cli(
        type(default),
        prog=f"{program} {argv[0]}",
        default=default,
        args=list(argv[1:]),
        config=(tyro.conf.AvoidSubcommands,),
        registry=_classes_of_defaults(),
    )


def _classes_of_defaults() -> ConstructorRegistry:
    """tyro's own rules, but every config inside has the class of its default.

    The annotation of a field may be a union of classes that are all named Config, one
    a module, and tyro tells the members of a union apart by their names.
    """
    registry = ConstructorRegistry()
    asking = False

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal asking
        if asking:
            return None
        asking = True
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            asking = False
        if not isinstance(spec, StructConstructorSpec):
            return None
        fields = tuple(
            dataclasses.replace(
                field,
                type=type(field.default)
                if _is_config(field.default)
                else _without_functions(field.type),
            )
            for field in spec.fields
        )
        return dataclasses.replace(spec, fields=fields)

    return registry


def _without_functions(annotation: Any) -> Any:
    """A union less its functions, which no command line can give."""
    arms = typing.get_args(annotation)
    if not isinstance(annotation, types.UnionType):
        return annotation
    rest = [arm for arm in arms if typing.get_origin(arm) is not Callable]
    return functools.reduce(operator.or_, rest) if rest else annotation


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; the nearest is {close[0]!r}" if close else ""


def _beside(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"There is no directory {folder} either."
    names = sorted(p.name for p in folder.glob("*.py") if p.name != "__init__.py")
    if not names:
        return f"There is no Python file in {folder}."
    near = difflib.get_close_matches(path.name, names, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{folder} holds {', '.join(names)}.{hint}"
