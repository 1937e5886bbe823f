"""Run a recurrence with its gradients, and check the laws that its errors obey.

A program takes far longer to compile than to run, so tests share them: arguments of the
same shapes, types and options are one program.
"""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np

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
    op,
    inputs,
    form,
    *,
    dtype=None,
    backward=True,
    detect_races=False,
    segment_ids=None,
    cu_seqlens=None,
    **options,
):
    """Return results and gradients by the oracle's names, in numpy float64.

    A kernel is interpreted, with NaN in unwritten memory.

    Args:
        op: a `recurrences.Recurrence`.
        form: the implementation.
        dtype: dtype of the arguments named in `op.narrow`.
        backward: whether to compute the gradients.
        options: static arguments of the operation.
    """
    operands, names, gradients = arguments(inputs)
    if dtype is not None:
        operands |= {name: operands[name].astype(dtype) for name in op.narrow}
    streams = {"segment_ids": segment_ids, "cu_seqlens": cu_seqlens}
    options = tuple(sorted({"implementation": form, **options}.items()))
    call, interpreted = _run, nullcontext()
    if form in INTERPRETED:
        call = _run_as_written
        interpreted = INTERPRETED[form](
            uninitialized_memory="nan", detect_races=detect_races
        )
    with interpreted:
        given = gradients if backward else None
        results = call(op.call, options, names, operands, given, streams)
    return {name: np.asarray(x, np.float64) for name, x in results.items()}


def arguments(inputs):
    """The operands by name, the names of the results' gradients, and the gradients."""
    given = {name: x for name, x in inputs.items() if x is not None}
    operands = {name: x for name, x in given.items() if not name.startswith("d_")}
    names = tuple(name for name in given if name.startswith("d_"))
    return operands, names, tuple(given[name] for name in names)


def one_segment(inputs):
    """Segment ids that divide nothing, with which a law shares programs with others.

    None for inputs without a decay: an id would give them one.
    """
    tokens = next(iter(inputs.values()))
    ungated = inputs.get("g", tokens) is None
    return None if ungated else np.zeros(tokens.shape[:2], int)


def programs() -> int:
    """The number of programs compiled for plain JAX."""
    return _run._cache_size()


def with_gradients(call, options, names, operands, gradients, streams):
    """Results by name, and the gradients for `operands` given those for the results.

    Args:
        options: pairs of names and static arguments.
        names: of the results' gradients, in the order of the results.
        gradients: None for the results alone.
        streams: arguments without a gradient.
    """

    def f(operands):
        return call(**operands, **streams, **dict(options))

    of_results = [name.removeprefix("d_") for name in names]
    if gradients is None:
        return dict(zip(of_results, f(operands), strict=True))
    results, pull_back = jax.vjp(f, operands)
    pairs = zip(gradients, results, strict=True)
    (pulled_back,) = pull_back(tuple(d.astype(x.dtype) for d, x in pairs))
    named = dict(zip(of_results, results, strict=True))
    return named | {f"d_{name}": x for name, x in pulled_back.items()}


_run = jax.jit(with_gradients, static_argnums=(0, 1, 2))
_run_as_written = jax.jit(
    with_gradients, static_argnums=(0, 1, 2), compiler_options=AS_WRITTEN
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


def narrowed(op, inputs):
    """Round inputs to bfloat16, so that the oracle gets the kernel's numbers."""
    names = (*op.narrow, f"d_{op.output}")
    narrow = {name: inputs[name].astype(jnp.bfloat16) for name in names}
    return inputs | {name: x.astype(np.float32) for name, x in narrow.items()}


def with_states(inputs, count):
    """The inputs of one row with the states of so many sequences."""
    like = inputs["initial_state"]
    rng = np.random.default_rng(0)
    states = {
        name: rng.standard_normal((count, *like.shape[1:])).astype(np.float32)
        for name in ("initial_state", "d_state")
    }
    return inputs | states
