"""Derivatives that a kernel has not: refused in a sentence."""

from collections.abc import Callable

import jax


def refused(run: Callable, sentence: str, static: tuple[int, ...] = ()) -> Callable:
    """`run`, with a NotImplementedError instead of a derivative.

    Args:
        sentence: what is missing, and the way out.
        static: indices of the arguments that are no arrays.
    """
    run = jax.custom_jvp(run, nondiff_argnums=static)

    @run.defjvp
    def _(*_):
        raise NotImplementedError(sentence)

    return run


def once(operation: str, rule: Callable, static: tuple[int, ...] = ()) -> Callable:
    """A rule of a TPU kernel's gradient, which has no gradient itself."""
    sentence = (
        f"{operation}: the TPU kernel has first derivatives alone; pass "
        "implementation='xla' to differentiate them again."
    )
    return refused(rule, sentence, static)
