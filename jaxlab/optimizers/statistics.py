"""The weights for which an optimizer needs statistics of products."""

import operator
from typing import Any

import jax

from jaxlab.optimizers.trees import check_flags


def tapped_by(settings: Any, specs: Any, trainable: Any = None) -> Any:
    """Return which weights' taps an optimizer needs, by its settings' ``tapped``.

    Args:
        settings: settings of an optimizer, such as `MKOR`.
        specs: tree of `ParamSpec`.
        trainable: tree of booleans, the parameters that are learned; None for all.

    Returns:
        A tree of booleans, one for each parameter; None if it needs no statistics.

    Raises:
        TypeError: a leaf of `trainable` is no boolean.
        ValueError: it has other leaves than the parameters; names one.
    """
    if not hasattr(settings, "tapped"):
        return None
    tapped = settings.tapped(specs)
    if trainable is None:
        return tapped
    check_flags(trainable, specs, "trainable")
    return jax.tree.map(operator.and_, tapped, trainable)
