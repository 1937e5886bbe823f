"""Figures and events in an optimizer's state, at any depth, for the log of a run.

The class of a state names the fields that the log shows:

    class SomeState(NamedTuple):
        skipped: Array
        left_at: Array

        FIGURES = ("skipped",)                      # scalars, logged at every step
        EVENTS = {"left_at": "it leaves its ..."}   # scalars, and what the event means

The field of an event holds the number of steps made when it occurred, and is below 0
before, so a loop can report it once, at that step, without keeping a record.
"""

from collections.abc import Iterable
from typing import Any

import jax
from jaxtyping import Array


def reported(state: Any) -> dict[str, Array]:
    """Return the figures and events of a state by name; works under `jax.jit`.

    Raises:
        ValueError: two parts of the state report the same name.
    """
    return _collected(
        (name, getattr(part, name))
        for part in _parts(state)
        for name in (*getattr(part, "FIGURES", ()), *getattr(part, "EVENTS", ()))
    )


def events(state: Any) -> dict[str, str]:
    """Return the descriptions of a state's events by name; shapes alone suffice.

    Raises:
        ValueError: two parts of the state report the same name.
    """
    return _collected(
        item for part in _parts(state) for item in getattr(part, "EVENTS", {}).items()
    )


def _parts(state: Any) -> list[Any]:
    """The nodes of a tree at every depth, outermost first."""
    nodes = []

    def note(node: Any) -> bool:
        nodes.append(node)
        return False

    jax.tree.flatten(state, is_leaf=note)
    return nodes


def _collected(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    values = {}
    for name, value in items:
        if name in values:
            raise ValueError(
                f"Two parts of the optimizer's state report {name!r}; call `reported` "
                "on each part separately."
            )
        values[name] = value
    return values
