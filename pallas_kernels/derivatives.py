"""Errors for the derivatives that a kernel does not have."""

from collections.abc import Callable

import jax


def not_differentiable(
    run: Callable, sentence: str, static: tuple[int, ...] = ()
) -> Callable:
    """`run`, which raises NotImplementedError when it is differentiated.

    Args:
        sentence: the error message: what is missing, and what to do instead.
        static: indices of the arguments that are not arrays.
    """
    run = jax.custom_jvp(run, nondiff_argnums=static)

    @run.defjvp
    def _(*_):
        raise NotImplementedError(sentence)

    return run


def first_order_only(
    operation: str, rule: Callable, static: tuple[int, ...] = ()
) -> Callable:
    """A rule of a TPU kernel's gradient, which cannot be differentiated itself."""
    sentence = (
        f"{operation}: the TPU kernel has only first derivatives; pass "
        "implementation='xla' to differentiate them again."
    )
    return not_differentiable(rule, sentence, static)
