"""Configs: frozen dataclasses in Python files, on command lines and in checkpoints."""

from jaxlab.config.codec import (
    differences,
    from_json,
    is_config,
    to_json,
    updated,
)
from jaxlab.config.command_line import parse_cli
from jaxlab.config.files import load
from jaxlab.config.names import tag

__all__ = [
    "differences",
    "from_json",
    "is_config",
    "load",
    "parse_cli",
    "tag",
    "to_json",
    "updated",
]
