"""Pick the implementation of an operation: the best that can run, or the named one."""

from collections.abc import Callable, Mapping

from pallas_kernels.platform import runs_gpu_kernels, runs_tpu_kernels

# Best first. "xla" is plain JAX for every platform, "reference" the definition itself.
PREFERENCE = ("pallas_tpu", "pallas_gpu", "xla", "reference")


def select(
    operation: str,
    implementation: str | None,
    candidates: Mapping[str, Callable | str],
) -> Callable:
    """Return the function that computes an operation here.

    Args:
        operation: the operation's public name, for the error messages.
        implementation: a key of `candidates`, or None for the best that can run.
        candidates: for each name in `PREFERENCE`, the function, or the sentence that
          says why it cannot run here.

    Raises:
        ValueError: `implementation` is no known name.
        NotImplementedError: the named implementation cannot run here. A named
          implementation is never replaced by another.
    """
    if implementation is None:
        able = (candidates[name] for name in PREFERENCE)
        return next(candidate for candidate in able if not isinstance(candidate, str))
    if implementation not in candidates:
        known = ", ".join(repr(name) for name in PREFERENCE)
        raise ValueError(
            f"{operation} has no implementation {implementation!r}; choose one of "
            f"{known}, or None for the best that can run."
        )
    chosen = candidates[implementation]
    if isinstance(chosen, str):
        raise NotImplementedError(
            f"{operation} cannot run with implementation={implementation!r}: {chosen}"
        )
    return chosen


def tpu_kernel(
    implementation: str | None, kernel: Callable, misfit: Callable[[], str | None]
) -> Callable | str:
    """The candidate "pallas_tpu": the kernel, or why it is not taken.

    No kernel's speed has been measured on a TPU, so None does not choose it.

    Args:
        implementation: what the caller named.
        misfit: says why the kernel cannot take the arguments, or None.
    """
    runs = runs_tpu_kernels()
    return _kernel(implementation, "TPU", "a TPU", runs, kernel, misfit)


def gpu_kernel(
    implementation: str | None, kernel: Callable, misfit: Callable[[], str | None]
) -> Callable | str:
    """The candidate "pallas_gpu", likewise: its kernels are for Hopper."""
    runs = runs_gpu_kernels()
    return _kernel(implementation, "GPU", "a Hopper GPU", runs, kernel, misfit)


def _kernel(implementation, kind, device, runs, kernel, misfit) -> Callable | str:
    name = kind.lower()
    if implementation != f"pallas_{name}":
        return "it is taken only where it is named: its speed is not measured yet."
    if not runs:
        return (
            f"its {kind} kernel runs on {device} (or interpreted, under "
            f"pallas_kernels.platform.interpreted_{name}()), and this is traced for "
            "another platform; pass implementation='xla' or None."
        )
    return misfit() or kernel
