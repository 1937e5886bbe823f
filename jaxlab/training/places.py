"""Paths in a run's config, found from wherever the run is looked at.

A config names its corpus and the run it starts from by paths that usually begin in the
working directory. They are looked for where they began when the run did, and in the
folder that the run's own path now leads to, so that a run can be used from elsewhere
and moved together with its data.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxlab.config import is_config
from jaxlab.data import CorpusConfig
from jaxlab.training.config import RunConfig


def roots(run: str | Path, cfg: RunConfig) -> list[Path]:
    """The folders in which a run's relative paths may begin, the likeliest first.

    Args:
        run: where the run is now.
        cfg: its config, as saved.
    """
    own = (*Path(cfg.directory).parts, cfg.name)
    now = Path(run).absolute().parts
    leads = not Path(cfg.directory).is_absolute() and now[-len(own) :] == own
    found = [Path(*now[: -len(own)])] if leads else []
    return [*found, *([] if cfg.root is None else [Path(cfg.root)]), Path.cwd()]


def find(path: str, roots: Sequence[Path]) -> str:
    """The path below the first root that has it.

    It stays as it is if that is the working directory, or if none has it.
    """
    if Path(path).is_absolute():
        return path
    there = next((root for root in roots if (root / path).exists()), Path.cwd())
    return path if there.samefile(Path.cwd()) else str(there / path)


def located[C: RunConfig](cfg: C, roots: Sequence[Path]) -> C:
    """A config whose corpora, and runs to start from, are found."""
    return _map_paths(cfg, lambda path: find(path, roots))


def resolved(cfg: RunConfig, roots: Sequence[Path]) -> RunConfig:
    """`cfg.resolved()`, with its paths found for that and then as they were given."""
    given = {}

    def found(path: str) -> str:
        there = find(path, roots)
        given[there] = path
        return there

    full = _map_paths(cfg, found).resolved()
    return _map_paths(full, lambda path: given.get(path, path))


def _map_paths(cfg: Any, change: Callable[[str], str]) -> Any:
    """A config with its directories of corpora and its `init_from` changed."""
    changed = {}
    for field in dataclasses.fields(cfg) if is_config(cfg) else ():
        value = getattr(cfg, field.name)
        of_a_corpus = isinstance(cfg, CorpusConfig) and field.name == "directory"
        if isinstance(value, str) and (of_a_corpus or field.name == "init_from"):
            changed[field.name] = change(value)
        elif is_config(value):
            changed[field.name] = _map_paths(value, change)
    return dataclasses.replace(cfg, **changed) if changed else cfg
