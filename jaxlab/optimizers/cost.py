"""What an optimizer costs before it runs."""

import math
from typing import Any

import jax
import optax

from jaxlab.params import abstract


def state_bytes(optimizer: optax.GradientTransformation, specs: Any) -> int:
    """Bytes of an optimizer's state for parameters `specs`, over all devices.

    Found from shapes alone; nothing is allocated. A state that is the same on several
    devices counts once.

    Args:
        optimizer: any optax transformation.
        specs: tree of `ParamSpec`.
    """
    state = jax.eval_shape(optimizer.init, abstract(specs))
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )
