"""A config file, overridden on a command line.

  python scripts/train.py configs/tiny.py --model.width 64

`configs/tiny.py` assigns one frozen dataclass to the name `config`; every field, at
any depth, is an option.
"""

import dataclasses
import functools
import operator
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructTypeInfo,
)

from jaxlab.config.codec import is_config
from jaxlab.config.files import load


def parse_cli(argv: Sequence[str], description: str | None = None) -> Any:
    """The config of a command line: a config file, then overrides of its fields.

    `parse_cli(["configs/tiny.py", "--model.width", "64"])`. An entry of a tuple is
    named by its index: `--model.pattern.0.n-householders 2`. A field that the config
    around it sets, such as the width of a model's layers, is no option. A wrong option
    or file ends the program with code 2 and a message, --help with code 0.

    Args:
        argv: the arguments, without the program's name (`sys.argv[1:]`).
        description: what --help says first, such as the program's own options; None
            takes the docstring of the config's class.
    """
    program = Path(sys.argv[0]).name
    usage = f"usage: {program} CONFIG.py [--field value ...]"
    if not argv or argv[0].startswith("-"):
        help_wanted = any(argument in ("-h", "--help") for argument in argv)
        said = f"{usage}\n`{program} CONFIG.py --help` lists the fields of a config."
        if description and help_wanted:
            said += f"\n\n{description.strip()}"
        print(said, file=sys.stdout if help_wanted else sys.stderr)
        raise SystemExit(0 if help_wanted else 2)
    try:
        default = load(argv[0])
    except (FileNotFoundError, ValueError) as error:
        print(f"{usage}\n{error}", file=sys.stderr)
        raise SystemExit(2) from error
    try:
        return tyro.cli(
            type(default),
            prog=f"{program} {argv[0]}",
            description=description,
            default=default,
            args=list(argv[1:]),
            config=(tyro.conf.AvoidSubcommands,),
            registry=_rules(default),
        )
    except BrokenPipeError:  # nobody reads the help further, as in `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


class _Unfinished(NamedTuple):
    """A config that waits for the fields that the one around it sets."""

    cls: type
    values: dict[str, Any]
    missing: frozenset[str]


def _rules(default: Any) -> ConstructorRegistry:
    """tyro's rules, with two differences.

    Every nested config has the class of its default: a field's annotation may be a
    union of classes from different modules, all named Config, and tyro tells the
    members of a union apart by their names.

    A field that the config around it sets is no option, and that config's value is
    there when the inner one is checked: 5 heads fit a model whose width is now 200,
    though they do not fit the layer's own width.
    """
    registry = ConstructorRegistry()
    missing = _set_around(default)
    in_rule = False

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal in_rule
        if in_rule:
            return None
        in_rule = True
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            in_rule = False
        if not isinstance(spec, StructConstructorSpec):
            return None
        names = missing.get(id(info.default), frozenset())
        fields = tuple(
            dataclasses.replace(
                field,
                type=type(field.default)
                if is_config(field.default)
                else _without_functions(field.type),
            )
            for field in spec.fields
            if field.name not in names
        )
        make = spec.instantiate
        if is_config(info.default):
            make = _maker(type(info.default), names)
        return StructConstructorSpec(make, fields)

    return registry


def _maker(cls: type, missing: frozenset[str]) -> Callable[..., Any]:
    """A function that makes a config, or one that waits for its missing fields."""

    def make(**values):
        waiting = _Unfinished(cls, values, missing)
        return waiting if missing else _made(waiting)

    doc = cls.__doc__ or ""
    made_up = doc.startswith(f"{cls.__name__}(")  # by Python, of a class without one
    make.__doc__ = None if made_up else doc  # tyro shows it
    return make


def _made(cfg: _Unfinished) -> Any:
    """The config, whose values now include what was missing."""
    values = {name: _finish(x, cfg.values, name) for name, x in cfg.values.items()}
    return cfg.cls(**values)


def _finish(value: Any, around: dict[str, Any], where: str) -> Any:
    """A field's value; the configs in it take what they miss from the values around."""
    if type(value) is tuple:
        return tuple(_finish(x, around, f"{where}.{i}") for i, x in enumerate(value))
    if not isinstance(value, _Unfinished):
        return value
    given = {name: around[name] for name in value.missing}
    try:
        return _made(value._replace(values=value.values | given))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _set_around(cfg: Any) -> dict[int, frozenset[str]]:
    """Fields of the configs inside one that the config around each sets, by its id.

    Such a field is a whole number that doubles with the field of the same name in the
    config around it.
    """
    found: dict[int, frozenset[str]] = {}
    parts = _parts(cfg)
    for field in dataclasses.fields(cfg):
        name, value = field.name, getattr(cfg, field.name)
        if type(value) is not int or value == 0:
            continue
        try:
            changed = _parts(dataclasses.replace(cfg, **{name: 2 * value}))
        except Exception:  # whatever a config's check raises
            continue
        for part, other in zip(parts, changed, strict=False):
            if [getattr(x, name, None) for x in (part, other)] == [value, 2 * value]:
                found[id(part)] = found.get(id(part), frozenset()) | {name}
    for part in parts:
        found |= _set_around(part)
    return found


def _parts(cfg: Any) -> list[Any]:
    """The configs that are fields of one, or in a tuple that is."""
    values = (getattr(cfg, field.name) for field in dataclasses.fields(cfg))
    listed = [value if type(value) is tuple else (value,) for value in values]
    return [part for parts in listed for part in parts if is_config(part)]


def _without_functions(annotation: Any) -> Any:
    """A union without its function types, which a command line cannot express."""
    members = typing.get_args(annotation)
    if not isinstance(annotation, types.UnionType):
        return annotation
    others = [member for member in members if typing.get_origin(member) is not Callable]
    return functools.reduce(operator.or_, others) if others else annotation
