"""A config file, overridden on a command line.

  python scripts/train.py configs/tiny.py --model.width 64

`configs/tiny.py` assigns one frozen dataclass to the name `config`; every field, at
any depth, is an option.
"""

import dataclasses
import functools
import operator
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructTypeInfo,
)

from jaxlab.config.codec import is_config
from jaxlab.config.files import load


def parse_cli(argv: Sequence[str]) -> Any:
    """The config of a command line: a config file, then overrides of its fields.

    `parse_cli(["configs/tiny.py", "--model.width", "64"])`. An entry of a tuple is
    named by its index: `--model.pattern.0.n-householders 2`. A wrong option or file
    ends the program with code 2 and a message, --help with code 0.

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
    """tyro's rules, except that every nested config has the class of its default.

    A field's annotation may be a union of classes from different modules, all named
    Config, and tyro tells the members of a union apart by their names.
    """
    registry = ConstructorRegistry()
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
        fields = tuple(
            dataclasses.replace(
                field,
                type=type(field.default)
                if is_config(field.default)
                else _without_functions(field.type),
            )
            for field in spec.fields
        )
        return dataclasses.replace(spec, fields=fields)

    return registry


def _without_functions(annotation: Any) -> Any:
    """A union without its function types, which a command line cannot express."""
    members = typing.get_args(annotation)
    if not isinstance(annotation, types.UnionType):
        return annotation
    others = [member for member in members if typing.get_origin(member) is not Callable]
    return functools.reduce(operator.or_, others) if others else annotation
