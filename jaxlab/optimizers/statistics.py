"""The weights for which an optimizer needs statistics of products."""

from typing import Any


def tapped_by(settings: Any, specs: Any) -> Any:
    """Return which weights' taps an optimizer needs, by its settings' ``tapped``.

    Args:
        settings: settings of an optimizer, such as `MKOR`.
        specs: tree of `ParamSpec`.

    Returns:
        A tree of booleans, one for each parameter; None if it needs no statistics.
    """
    tapped = getattr(settings, "tapped", None)
    return None if tapped is None else tapped(specs)
