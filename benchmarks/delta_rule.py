"""Time the chunked delta rule beside the recurrence, autodiff and another library."""

import os
import pathlib
import tempfile
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import delta_rule as cases
from benchmarks.record import record
from benchmarks.turns import Peer, alternate, report, run, summarise, timed
from pallas_kernels import delta_product
from pallas_kernels.delta_rule import accurate, chunked

NAMES = ("q", "k", "v", "beta", "g")
PEER = pathlib.Path(__file__).with_name("delta_rule_peer.py")
DIRECTIONS = {"forward": False, "forward and backward": True}


def main(peer_python: str | None, turns: int, shapes: list[str]) -> pathlib.Path:
    """Time every case and write results/delta_rule.json."""
    peer, versions = None, {}
    if peer_python is not None:
        peer = Peer(peer_python, PEER)
        versions = peer.ask(threads=len(os.sched_getaffinity(0)))
    results = {}
    for name in shapes:
        inputs = cases.draw("random", cases.SHAPES[name])
        contender = peer if cases.SHAPES[name].N == 1 else None  # it has one step only
        if contender is not None:
            check_peer(contender, inputs)
        for direction, gradients in DIRECTIONS.items():
            contestants = ours(inputs, gradients)
            if gradients:
                contestants |= backwards(inputs)
            functions = {n: timed(program) for n, program in contestants.items()}
            if contender is not None:
                functions["transformers"] = asked(contender, gradients)
            case = f"{name}, {direction}"
            results[case] = summarise(alternate(functions, turns))
            for n, program in contestants.items():
                memory = program[0].memory_analysis().temp_size_in_bytes
                results[case][n]["temporary_MB"] = round(memory / 1e6, 1)
            report(case, results[case])
    shape_values = {name: cases.SHAPES[name]._asdict() for name in shapes}
    return record(
        "delta_rule",
        versions=versions,
        turns=turns,
        shapes=shape_values,
        dtype="float32",
        ratio="time of the contestant / time of xla, in the same turn",
        cases=results,
    )


def ours(inputs, gradients: bool) -> dict:
    """The implementations of the library, compiled.

    On a CPU all precisions multiply in the same way, but only the default one refines.
    """

    def by(implementation, precision=None):
        def f(*arguments):
            return delta_product(
                *arguments, implementation=implementation, precision=precision
            )[0]

        return compiled(f, inputs, gradients)

    return {
        "xla": by("xla"),
        "xla without refinement": by("xla", "high"),
        "reference": by("reference"),
    }


def backwards(inputs) -> dict:
    """The programs that differentiate the forward pass automatically, compiled.

    Autodiff treats the correction of W as a constant, because that term is only as
    large as rounding.
    """

    def f(q, k, v, beta, g):
        (B, _, H, K), V = q.shape, v.shape[-1]
        states = jnp.zeros((1, B, H, K, V), q.dtype)
        return chunked.chunked(q, k, v, beta, g, states, None, None, None, False)[0]

    def forward(*arguments):
        return chunked._forward(*arguments)[0]

    def constant(*arguments, residual=accurate.residual):
        return jax.lax.stop_gradient(residual(*arguments))

    by_hand = compiled(f, inputs, True)
    remat = jax.checkpoint(forward, static_argnums=(0,))
    with mock.patch.object(accurate, "residual", constant):
        with mock.patch.object(chunked, "delta_chunks", forward):
            autodiff = compiled(f, inputs, True)
        with mock.patch.object(chunked, "delta_chunks", remat):
            checkpoint = compiled(f, inputs, True)
    names = ("o", *(f"d_{n}" for n in NAMES))
    for name, got, want in zip(names, run(autodiff), run(by_hand), strict=True):
        close(name, got, want)
    return {"autodiff": autodiff, "autodiff with checkpoint": checkpoint}


def compiled(f: Callable, inputs, gradients: bool):
    """The compiled program of f, or of f and its gradients, and its arguments."""
    arguments = [jnp.asarray(inputs[n]) for n in NAMES]
    if gradients:
        d_o = jnp.asarray(inputs["d_o"])

        def g(*arguments):
            o, pullback = jax.vjp(f, *arguments)
            return o, *pullback(d_o)

    else:
        g = f
    return jax.jit(g).lower(*arguments).compile(), arguments


def asked(peer: Peer, gradients: bool) -> Callable[[], float]:
    """A function that makes the peer run once and returns the seconds it took."""
    return lambda: peer.ask(gradients=gradients)["seconds"]


def check_peer(peer: Peer, inputs):
    """Give the peer the inputs, and check that it computes the same."""
    arrays = {n: inputs[n] for n in (*NAMES, "d_o")}
    arrays |= {n: inputs[n][:, :, 0] for n in ("k", "v", "beta")}
    with tempfile.TemporaryDirectory() as folder:
        given, answered = f"{folder}/inputs.npz", f"{folder}/results.npz"
        np.savez(given, **arrays)
        peer.ask(load=given, save=answered)
        theirs = dict(np.load(answered))
    mine = dict(
        zip(
            ("o", *(f"d_{n}" for n in NAMES)),
            run(ours(inputs, True)["xla"]),
            strict=True,
        )
    )
    for name in theirs:
        close(name, mine[name].reshape(theirs[name].shape), theirs[name])


def close(name, got, want):
    error = np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)
    if not error < 1e-4:
        raise RuntimeError(f"{name} differs by {error:.1e}, so times mean nothing.")
