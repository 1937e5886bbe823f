"""Pick the implementation of an operation: the best that can run, or the named one."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from pallas_kernels import partition, platform

# Best first. "xla" is plain JAX for every platform, "reference" the definition itself.
PREFERENCE = ("pallas_tpu", "pallas_gpu", "xla", "reference")

FASTER = {
    "pallas_tpu": (
        "delta_rule",
        "delta_product",
        "gated_linear_attention",
        "selective_scan",
    ),
    "pallas_gpu": (),
}
"""Operations whose kernel None takes before plain JAX.

A TPU's by the compiler's estimates, benchmarks/results/defaults.json: at most half of
plain JAX's cycles in every case. Neither that of paged attention, whose work depends
on the data, nor a GPU's can be estimated.
"""


class Kernel(NamedTuple):
    """A candidate that only one kind of device runs.

    Attributes:
        run: the kernel.
        misfit: says why it cannot take the arguments, or None.
    """

    run: Callable
    misfit: Callable[[], str | None]


def select(
    operation: str,
    implementation: str | None,
    candidates: Mapping[str, Callable | Kernel | str],
) -> Callable:
    """Return the function that computes an operation here.

    Args:
        operation: the operation's public name.
        implementation: a key of `candidates`, or None for the best that can run: of
          kernels those of `FASTER`, on one device or under a mesh, which says how they
          are divided (`partition`).
        candidates: for each name in `PREFERENCE`, the function, or the sentence that
          says why there is none.

    Raises:
        ValueError: `implementation` is no known name.
        NotImplementedError: the named implementation cannot run here. A named
          implementation is never replaced by another.
    """
    if implementation is None:
        able = (name for name in PREFERENCE if _is_taken(name, operation, candidates))
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


def _is_taken(name, operation, candidates) -> bool:
    """Whether None may take a candidate."""
    if isinstance(candidates[name], Kernel):
        if operation not in FASTER[name] or not partition.is_known():
            return False
    return _obstacle(name, candidates[name]) is None


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
