"""Configs as JSON and back."""

import dataclasses
from typing import Any

from jaxlab.config.names import find, nearest, tag

SCALARS = (bool, int, float, str, type(None))


def to_json(config: Any) -> dict:
    """A dataclass as {"type": its name, field: value, ...}; see `jaxlab.config.names`.

    Args:
        config: dataclass of bools, ints, floats, strings, None, dataclasses and tuples
          of these.

    Returns:
        Dicts, lists and scalars; `from_json` gives back an equal config.

    Raises:
        TypeError: a field holds anything else; the message gives its dotted name.
    """
    if not is_config(config):
        raise TypeError(f"A config is a dataclass, and {config!r} is not one.")
    return _to_json(config, "config")


def _to_json(value: Any, where: str) -> Any:
    if is_config(value):
        try:
            name = tag(type(value))
        except TypeError as error:
            raise TypeError(f"{where} cannot be saved: {error}") from None
        fields = {
            field.name: _to_json(getattr(value, field.name), f"{where}.{field.name}")
            for field in dataclasses.fields(value)
        }
        return {"type": name, **fields}
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

    A missing field takes its default, so that configs saved before the field was added
    stay readable.

    Raises:
        ValueError: a type is unknown, has no field of a given name, or needs a field
            that is not given.
    """
    if not isinstance(data, dict):
        raise ValueError(f"A config in JSON is an object with a type, not {data!r}.")
    return _from_json(data)


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(item) for item in value)
    if not isinstance(value, dict):
        return value
    if not isinstance(value.get("type"), str):
        raise ValueError(f"A config in JSON is an object with a type, not {value!r}.")
    cls = find(value["type"])
    fields = dataclasses.fields(cls)
    names = [field.name for field in fields]
    given = [name for name in value if name != "type"]
    for name in given:
        if name not in names:
            raise ValueError(
                f"{value['type']} has no field {name!r}{nearest(name, names)}."
            )
    for field in fields:
        no_default = field.default is field.default_factory is dataclasses.MISSING
        if no_default and field.name not in given:
            raise ValueError(f"{value['type']} needs the field {field.name!r}.")
    return cls(**{name: _from_json(value[name]) for name in given})


def updated(data: dict) -> dict:
    """A saved config as this version would write it.

    Classes have their present names, and fields added since have their defaults. A
    config that this version cannot read is returned unchanged.
    """
    try:
        return to_json(from_json(data))
    except (TypeError, ValueError):
        return data


def differences(
    a: dict, b: dict, labels: tuple[str, str] = ("in the first", "in the second")
) -> list[str]:
    """List what differs in two configs: "model.width: 256 in the first, 128 in ..."."""
    return _differences(a, b, labels, "")


def _differences(a: Any, b: Any, labels: tuple[str, str], where: str) -> list[str]:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        differing = []
        for name in (*a, *(name for name in b if name not in a)):
            inner = f"{where}.{name}" if where else str(name)
            pair = a.get(name, _ABSENT), b.get(name, _ABSENT)
            differing += _differences(*pair, labels, inner)
        return differing
    if type(a) is type(b) and (a == b or (a != a and b != b)):  # NaN equals NaN here
        return []
    return [f"{where}: {_shown(a)} {labels[0]}, {_shown(b)} {labels[1]}"]


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def _shown(value: Any) -> str:
    return str(value.get("type", value)) if isinstance(value, dict) else repr(value)


def is_config(value: Any) -> bool:
    """Whether `value` is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)
