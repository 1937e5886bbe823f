"""An optimizer for some of the parameters; the others stay unchanged."""

from typing import Any

import jax
import optax

from jaxlab.optimizers.trees import check_flags


def build_for(
    settings: Any, specs: Any, steps: int, trainable: Any
) -> optax.GradientTransformationExtraArgs:
    """Build the transformation of `settings` for the trainable parameters.

    It keeps no state for the others, and their updates are 0.

    Args:
        settings: settings of an optimizer, such as `AdamW`.
        specs: tree of `ParamSpec`.
        steps: number of steps in the run.
        trainable: tree of booleans, one for each parameter.

    Raises:
        TypeError: a leaf of `trainable` is no boolean.
        ValueError: it has other leaves than the parameters; names one.
    """
    check_flags(trainable, specs, "trainable")
    if all(jax.tree.leaves(trainable)):
        return settings.build(specs, steps)
    learned = jax.tree.map(
        lambda keep, spec: spec if keep else optax.MaskedNode(), trainable, specs
    )
    frozen = jax.tree.map(lambda keep: not keep, trainable)
    return optax.with_extra_args_support(
        optax.chain(
            optax.masked(settings.build(learned, steps), trainable),
            optax.masked(optax.set_to_zero(), frozen),
        )
    )
