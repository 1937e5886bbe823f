"""Run a recurrence with its gradients, and check the laws that its errors obey."""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from benchmarks.cases import delta_rule as cases
from pallas_kernels import platform

EPS = float(np.finfo(np.float32).eps)
BFLOAT16_EPS = float(jnp.finfo(jnp.bfloat16).eps)

# Interpreted kernels are long programs that run once; optimising them would take most
# of the time.
AS_WRITTEN = {"xla_backend_optimization_level": 0}
INTERPRETED = {
    "pallas_tpu": platform.interpreted_tpu,
    "pallas_gpu": platform.interpreted_gpu,
}


def run(
    inputs,
    implementation,
    *,
    operation=pallas_kernels.delta_product,
    dtype=None,
    narrow=("q", "k", "v"),
    detect_races=False,
    segment_ids=None,
    cu_seqlens=None,
    **options,
):
    """Return results and gradients by the oracle's names, in numpy float64.

    A kernel is interpreted, with NaN in unwritten memory.

    Args:
        dtype: dtype of the arguments named in `narrow`.
        options: static arguments of the operation.
    """
    operands = {
        name: x
        for name, x in inputs.items()
        if x is not None and not name.startswith("d_")
    }
    if dtype is not None:
        operands |= {name: jnp.asarray(operands[name], dtype) for name in narrow}
    streams = {"segment_ids": segment_ids, "cu_seqlens": cu_seqlens}
    names = tuple(name for name in inputs if name.startswith("d_"))
    gradients = tuple(inputs[name] for name in names)
    options = tuple(sorted({"implementation": implementation, **options}.items()))
    call, interpreted = _run, nullcontext()
    if implementation in INTERPRETED:
        call = _run_as_written
        interpreted = INTERPRETED[implementation](
            uninitialized_memory="nan", detect_races=detect_races
        )
    with interpreted:
        results = call(operation, options, names, operands, gradients, streams)
    return {name: np.asarray(x, np.float64) for name, x in results.items()}


def in_float64(inputs, **options):
    """The recurrence in float64, which other tests compare with the oracle."""
    with jax.enable_x64():
        inputs = {n: x.astype(np.float64) for n, x in inputs.items() if x is not None}
        return run(inputs, "reference", **options)


def results_alone(inputs, operation):
    """Run without gradients on TPU; a single token has its own kernel for that."""
    operands = {n: x for n, x in inputs.items() if not n.startswith("d_")}
    with platform.interpreted_tpu(uninitialized_memory="nan", detect_races=True):
        return _alone(operation, operands)


def assert_same_on_a_mesh(inputs, operation, summed=()):
    """Check that dividing rows and heads among devices changes no bit.

    Args:
        summed: names of gradients that are sums over devices, which round differently.
    """

    def results():
        return (
            run(inputs, "pallas_tpu", operation=operation),
            results_alone(inputs, operation),
        )

    want = results()
    auto = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=auto)
    with jax.set_mesh(mesh):
        got = results()
    for name in summed:
        assert error(got[0].pop(name), want[0].pop(name)) <= 4 * EPS, name
    jax.tree.map(np.testing.assert_array_equal, got, want)


def _with_gradients(operation, options, names, operands, gradients, streams):
    def f(operands):
        return operation(**operands, **streams, **dict(options))

    results, pull_back = jax.vjp(f, operands)
    pairs = zip(gradients, results, strict=True)
    (pulled_back,) = pull_back(tuple(d.astype(x.dtype) for d, x in pairs))
    named = {name.removeprefix("d_"): x for name, x in zip(names, results, strict=True)}
    return named | {f"d_{name}": x for name, x in pulled_back.items()}


@partial(jax.jit, static_argnums=0, compiler_options=AS_WRITTEN)
def _alone(operation, operands):
    return operation(**operands, implementation="pallas_tpu")


_run = jax.jit(_with_gradients, static_argnums=(0, 1, 2))
_run_as_written = jax.jit(
    _with_gradients, static_argnums=(0, 1, 2), compiler_options=AS_WRITTEN
)


def error(got, want):
    """The relative error in the Euclidean norm; absolute if `want` is zero."""
    scale = np.linalg.norm(want)
    return np.linalg.norm(got - want) / (scale if scale > 0 else 1.0)


def assert_law(got, reference, want, factor=4):
    """Check an error of at most 4 times that of the token recurrence in this precision.

    The floor of 8 roundings is for inputs on which the recurrence rounds almost
    nothing, such as those where every state is forgotten at once.
    """
    assert got.keys() == want.keys()
    for name in want:
        bound = max(factor * error(reference[name], want[name]), 8 * EPS)
        assert error(got[name], want[name]) <= bound, name


def assert_bfloat16(got, chunked, want):
    """Check an error of at most twice that of the chunked form, or one rounding."""
    assert got.keys() == want.keys()
    for name in want:
        bound = max(2 * error(chunked[name], want[name]), BFLOAT16_EPS)
        assert error(got[name], want[name]) <= bound, name


def narrowed(inputs, names=("q", "k", "v", "d_o")):
    """Round inputs to bfloat16, so that the oracle gets the kernel's numbers."""
    narrow = {n: np.asarray(jnp.bfloat16(inputs[n]), np.float32) for n in names}
    return inputs | narrow


def small(B=2, T=150, N=1, H=2, K=16, V=12):
    """A small shape that is no multiple of any block size."""
    return cases.Shape(B, T, N, H, K, V)
