"""What an optimizer's state has to tell a log, found wherever it is nested.

The class of a state names the fields that are worth a line:

    class SomeState(NamedTuple):
        skipped: Array
        left_at: Array

        FIGURES = ("skipped",)                      # scalars, of every step
        EVENTS = {"left_at": "it leaves its ..."}   # scalars, and what came to pass

An event's field is the number of steps made when it came to pass, and below 0 before,
so that a loop tells it once, at that step, without remembering anything.
"""

from collections.abc import Iterable
from typing import Any

import jax
from jaxtyping import Array


def reported(state: Any) -> dict[str, Array]:
    """The figures and events of a state, by name; also under `jax.jit`.

    Raises:
        ValueError: two parts of the state have one name to tell.
    """
    return _collected(
        (name, getattr(part, name))
        for part in _parts(state)
        for name in (*getattr(part, "FIGURES", ()), *getattr(part, "EVENTS", ()))
    )


def events(state: Any) -> dict[str, str]:
    """What the events of a state, or of its shapes, say; by name.

    Raises:
        ValueError: as of `reported`.
    """
    return _collected(
        item for part in _parts(state) for item in getattr(part, "EVENTS", {}).items()
    )


def _parts(state: Any) -> list[Any]:
    """A tree's nodes at every depth, from the outermost."""
    found = []

    def note(node: Any) -> bool:
        found.append(node)
        return False

    jax.tree.flatten(state, is_leaf=note)
    return found


def _collected(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found = {}
    for name, value in items:
        if name in found:
            raise ValueError(
                f"Two parts of the optimizer's state report {name!r}; call `reported` "
                "with each by itself."
            )
        found[name] = value
    return found
