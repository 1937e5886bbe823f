"""Selecting an operation's implementation: the best that can run, or a named one."""

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
"""The number of tokens from which `implementation=None` prefers a kernel to plain JAX.

For a TPU, where the compiler estimates at most half of plain JAX's cycles in every
measured case (benchmarks/results/defaults.json). There are no estimates for paged
attention, whose work depends on the data, or for a GPU. Many rows shorter than a chunk
gain nothing, since they are padded.
"""


class Work(NamedTuple):
    """The size of a kernel's task."""

    rows: int
    tokens: int
    heads: int


class Kernel(NamedTuple):
    """An implementation that runs on one kind of device only.

    Attributes:
        run: the kernel.
        misfit: returns why it cannot take the arguments, or None.
        work: the size that decides whether it is the default.
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
        implementation: a key of `candidates`, or None for the best that can run; only
          kernels in `FASTER` count, and only where all devices share the work
          (`partition.divides`).
        candidates: for each name in `PREFERENCE`, the function, or a sentence on why
          there is none.

    Raises:
        ValueError: `implementation` is not a known name.
        NotImplementedError: the named implementation cannot run here. A named
          implementation is never replaced by another.
    """
    if implementation is None:
        eligible = (
            name
            for name in PREFERENCE
            if _is_eligible(name, operation, candidates[name])
        )
        return _function(candidates[next(eligible)])
    if not isinstance(implementation, str) or implementation not in candidates:
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


def _is_eligible(name: str, operation: str, candidate) -> bool:
    """Whether `implementation=None` may select a candidate."""
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
