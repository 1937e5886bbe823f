"""Pick the implementation of an operation: the best that can run, or the named one."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from pallas_kernels import partition, platform

# Best first. "xla" is plain JAX for every platform, "reference" the definition itself.
PREFERENCE = ("pallas_tpu", "pallas_gpu", "xla", "reference")

FASTER = {
    "pallas_tpu": {
        "delta_rule": 256,
        "delta_product": 256,
        "gated_linear_attention": 256,
        "selective_scan": 256,
    },
    "pallas_gpu": {},
}
"""Operations whose kernel None takes before plain JAX, from so many tokens on.

A TPU's by the compiler's estimates, benchmarks/results/defaults.json: at most half of
plain JAX's cycles in every such case. Neither that of paged attention, whose work
depends on the data, nor a GPU's can be estimated. Many rows of less than a chunk do not
win: they are padded.
"""


class Work(NamedTuple):
    """How much a kernel is asked for."""

    rows: int
    tokens: int
    heads: int


class Kernel(NamedTuple):
    """A candidate that only one kind of device runs.

    Attributes:
        run: the kernel.
        misfit: says why it cannot take the arguments, or None.
        work: for None to choose by.
    """

    run: Callable
    misfit: Callable[[], str | None]
    work: Work


def select(
    operation: str,
    implementation: str | None,
    candidates: Mapping[str, Callable | Kernel | str],
) -> Callable:
    """Return the function that computes an operation here.

    Args:
        operation: the operation's public name.
        implementation: a key of `candidates`, or None for the best that can run: of
          kernels those of `FASTER`, where all devices have a part (`partition`).
        candidates: for each name in `PREFERENCE`, the function, or the sentence that
          says why there is none.

    Raises:
        ValueError: `implementation` is no known name.
        NotImplementedError: the named implementation cannot run here. A named
          implementation is never replaced by another.
    """
    if implementation is None:
        able = (n for n in PREFERENCE if _is_best(n, operation, candidates[n]))
        return _function(candidates[next(able)])
    if implementation not in candidates:
        known = ", ".join(repr(name) for name in PREFERENCE)
        raise ValueError(
            f"{operation} has no implementation {implementation!r}; choose one of "
            f"{known}, or None for the best that can run."
        )
    chosen = candidates[implementation]
    obstacle = _obstacle(implementation, chosen)
    if obstacle:
        raise NotImplementedError(
            f"{operation} cannot run with implementation={implementation!r}: {obstacle}"
        )
    return _function(chosen)


def _is_best(name: str, operation: str, candidate) -> bool:
    """Whether None takes a candidate, if it comes to it."""
    if isinstance(candidate, Kernel):
        rows, tokens, heads = candidate.work
        fewest = FASTER[name].get(operation)
        if fewest is None or tokens < fewest or not partition.divides(rows, heads):
            return False
    return _obstacle(name, candidate) is None


def _obstacle(name: str, candidate) -> str | None:
    """Why a candidate cannot run here, or None."""
    if not isinstance(candidate, Kernel):
        return candidate if isinstance(candidate, str) else None
    kind, device, runs = {
        "pallas_tpu": ("TPU", "a TPU", platform.runs_tpu_kernels),
        "pallas_gpu": ("GPU", "a Hopper GPU", platform.runs_gpu_kernels),
    }[name]
    if runs():
        return candidate.misfit()
    return (
        f"its {kind} kernel runs on {device} (or interpreted, under "
        f"pallas_kernels.platform.interpreted_{kind.lower()}()), and this is traced "
        "for another platform; pass implementation='xla' or None."
    )


def _function(candidate) -> Callable:
    return candidate.run if isinstance(candidate, Kernel) else candidate
