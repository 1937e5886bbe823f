"""Statistics of products: which weights an optimizer takes them of."""

from typing import Any


def tapped_by(settings: Any, specs: Any) -> Any:
    """The weights whose taps an optimizer takes, as its settings say by ``tapped``.

    Args:
        settings: an optimizer's, such as `MKOR`.
        specs: of the parameters.

    Returns:
        A tree of booleans, one a parameter; None where it takes no statistics.
    """
    tapped = getattr(settings, "tapped", None)
    return None if tapped is None else tapped(specs)
