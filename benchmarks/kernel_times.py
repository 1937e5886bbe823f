"""Time the kernels of the recurrences beside plain JAX on the local device.

Every variant of `kernel_cycles` takes turns. Measured are nanoseconds per token and
head, the bandwidth (the fewest bytes that must be moved over the time) and the share of
the roofline (the least time that the products or those bytes take on such a device).
"""

import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernel_cycles import SCAN, VARIANTS, least_work
from benchmarks.record import RESULTS, record
from benchmarks.turns import alternate, timed
from jaxlab.training.peaks import PEAK_FLOPS
from pallas_kernels import programs

FORMS = ("xla", "pallas_tpu", "pallas_gpu")
SHAPES = {
    "long": {"B": 1, "T": 8192, "H": 96},
    "few": {"B": 2, "T": 16384, "H": 16},
    "wide": {"B": 4, "T": 4096, "H": 64},
    "small": {"B": 1, "T": 256, "H": 2},
}
"""All with K = V = 128; "small" is for a CPU."""

BANDWIDTH = {
    "TPU v5 lite": 819e9,
    "TPU v5e": 819e9,
    "TPU v5": 2765e9,
    "TPU v6": 1640e9,
    "TPU7x": 7380e9 / 2,
    "NVIDIA H100 PCIe": 2000e9,
    "NVIDIA H100 NVL": 3900e9,
    "NVIDIA H100": 3350e9,
    "NVIDIA H200": 4800e9,
}
"""Memory bandwidth of one JAX device in bytes a second, by prefixes of device_kind,
longer ones first. From the manufacturers' data sheets."""


def main(shapes: list[str], turns: int, variants: list[str]) -> pathlib.Path:
    """Time every case and write results/kernel_times.json."""
    kind = jax.devices()[0].device_kind
    timings, path = {}, RESULTS / "kernel_times.json"
    for variant in variants:
        for shape in shapes:
            case = f"{variant}, {shape}"
            timings[case] = measure(variant, SHAPES[shape], turns, kind)
            print(case, *(f"  {n}: {x}" for n, x in timings[case].items()), sep="\n")
            path = record("kernel_times", turns=turns, shapes=SHAPES, cases=timings)
    return path


def measure(variant: str, shape: dict[str, int], turns: int, kind: str) -> dict:
    """The times of each form of a variant, or the reason why the form cannot run."""
    timings, contestants = {}, {}
    for form in FORMS:
        try:
            contestants[form] = timed(program(variant, shape, form))
            contestants[form]()
        except Exception as reason:  # one kernel's failure must not stop the others
            contestants.pop(form, None)
            timings[form] = f"{type(reason).__name__}: {reason}"
    count = shape["B"] * shape["T"] * shape["H"]
    flops, moved = least_work(variant)
    for form, seconds in alternate(contestants, turns).items():
        quartiles = np.quantile(np.array(seconds) / count, (0.25, 0.5, 0.75))
        low, middle, high = map(float, quartiles)
        timings[form] = {
            "nanoseconds": round(1e9 * middle, 3),
            "quartiles": [round(1e9 * low, 3), round(1e9 * high, 3)],
            "gigabytes_per_second": float(f"{moved / middle / 1e9:.3g}"),
            "share_of_roofline": share(kind, flops, moved, middle),
        }
    return timings


def share(kind: str, flops: float, moved: float, seconds: float) -> float | None:
    """The least time on a kind of device over the time; None for an unknown device."""
    least = [
        next((work / x for name, x in peaks.items() if kind.startswith(name)), None)
        for work, peaks in ((flops, PEAK_FLOPS), (moved, BANDWIDTH))
    ]
    known = [x for x in least if x is not None]
    return round(max(known) / seconds, 3) if known == least else None


def program(variant: str, shape: dict[str, int], form: str):
    """Compile a form of a variant; return the program and its inputs.

    Raises:
        NotImplementedError: this form cannot run on the local device.
    """
    operation, arguments = VARIANTS[variant]
    H = shape["H"]
    sizes = {name: size for name, size in shape.items() if name != "H"}
    sizes |= {"E": 128 * H} if operation == SCAN else {"H": H}
    make = getattr(programs, operation)
    forward, shapes = make(
        **arguments | {"backward": False}, **sizes, implementation=form
    )
    function, _ = make(**arguments, **sizes, implementation=form)
    names = inspect.signature(forward).parameters
    keys = jax.random.split(jax.random.key(0), len(shapes))
    inputs = [draw(*x) for x in zip(names, keys, shapes, strict=True)]
    return jax.jit(function).lower(*inputs).compile(), inputs


def draw(name: str, key, shape) -> jax.Array:
    """Draw an argument like a trained layer's: short keys, small steps, slow decays."""
    if name in ("beta", "dt"):
        x = jax.random.uniform(key, shape.shape)
    elif name in ("g", "A"):
        x = -jax.random.uniform(key, shape.shape) / 16
    else:
        x = jax.random.normal(key, shape.shape)
        x = x / jnp.sqrt(128.0) if name in ("q", "k") else x
    return x.astype(shape.dtype)
