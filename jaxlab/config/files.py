"""Config files: Python files that assign a frozen dataclass to the name `config`."""

import ast
import dataclasses
import difflib
import importlib.util
import re
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxlab.config.codec import is_config
from jaxlab.config.names import CONFIG_FILE, nearest


def load(path: str | Path) -> Any:
    """The value named `config` in a Python file, which may import files next to it.

    Raises:
        FileNotFoundError: there is no such file; the message lists those in its folder.
        ValueError: the file cannot be run, and the message names the line; or it
            assigns no dataclass to `config`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no config file {path}. {_listing(path)}")
    name = f"{CONFIG_FILE}{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file; a config file ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses defined in the file look themselves up
    folder = str(path.parent.resolve())
    if folder not in sys.path:  # as Python does for a script
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does
        raise ValueError(_sentence(path, error)) from error
    if not hasattr(module, "config"):
        raise ValueError(
            f"{path} defines no `config`; a config file ends with `config = ...`, a "
            "frozen dataclass."
        )
    if not is_config(module.config):
        raise ValueError(
            f"`config` in {path} is {module.config!r}; it must be a dataclass."
        )
    return module.config


def _sentence(path: Path, error: Exception) -> str:
    """What went wrong in a config file, and in which line."""
    if isinstance(error, SyntaxError):
        return f"{error.filename or path}, line {error.lineno}: {error.msg}."
    namespace, line = _place(path, error.__traceback__)
    match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if match and (called := _call_with(match[1], path, namespace, line)):
        line, cls = called
        names = [field.name for field in dataclasses.fields(cls)]
        return (
            f"{path}, line {line}: {cls.__module__}.{cls.__qualname__} has no field "
            f"{match[1]!r}{nearest(match[1], names)}."
        )
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return f"{path}, line {line}: {kind}{error}"


def _place(path: Path, traceback: TracebackType | None) -> tuple[dict[str, Any], int]:
    """The names that the file's last frame knows, and its line."""
    namespace, line = {}, 0
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == str(path):
            frame = traceback.tb_frame
            namespace, line = frame.f_globals | frame.f_locals, traceback.tb_lineno
        traceback = traceback.tb_next
    return namespace, line


def _call_with(
    keyword: str, path: Path, namespace: dict[str, Any], line: int
) -> tuple[int, type] | None:
    """The line of `keyword` in the call that failed, and the dataclass called."""
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
    """The value of a name, of a chain of attributes, or of a call's function."""
    if isinstance(node, ast.Name):
        return namespace.get(node.id)
    if isinstance(node, ast.Attribute):
        return getattr(_resolve(node.value, namespace), node.attr, None)
    if isinstance(node, ast.Call):
        return _resolve(node.func, namespace)
    return None


def _listing(path: Path) -> str:
    """A sentence about the Python files in the folder of a missing file."""
    folder = path.parent
    if not folder.is_dir():
        return f"There is no directory {folder} either."
    names = sorted(p.name for p in folder.glob("*.py") if p.name != "__init__.py")
    if not names:
        return f"There is no Python file in {folder}."
    near = difflib.get_close_matches(path.name, names, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{folder} holds {', '.join(names)}.{hint}"
