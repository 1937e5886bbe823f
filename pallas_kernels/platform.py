"""The hardware that a computation is being traced for."""

import contextlib
import contextvars

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

_interpreted = contextvars.ContextVar("interpreted", default="")
HOPPER = ("H100", "H800", "H20")
"""Parts of the names of the GPUs that run the GPU kernels; H20 also matches H200."""


def platform() -> str:
    """The platform of the mesh in use, else of the default device: cpu, gpu or tpu.

    A mesh may describe devices that are not present, to compile for them (`aot`).
    Arguments committed to a device of another platform do not count.
    """
    name = str(_device().platform)
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def device_kind() -> str:
    """The vendor's name of the devices of that platform."""
    return _device().device_kind


def _device():
    """The (abstract) device of the mesh in use, else the default device."""
    mesh_device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(default, str):
        default = jax.devices(default)[0]
    return mesh_device or default or jax.devices()[0]


def runs_tpu_kernels() -> bool:
    """Whether TPU kernels can run here or are interpreted."""
    return _interpreted.get() == "tpu" or platform() == "tpu"


def runs_gpu_kernels() -> bool:
    """Whether GPU kernels, which need Hopper, can run here or are interpreted."""
    if _interpreted.get() == "gpu":
        return True
    return platform() == "gpu" and any(name in device_kind() for name in HOPPER)


@contextlib.contextmanager
def interpreted_tpu(**options):
    """Run TPU kernels on the CPU, step by step: correct but slow.

    Args:
        options: options of `pltpu.InterpretParams`, such as ``detect_races=True``.
    """
    with (
        _interpreting("tpu"),
        pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**options)),
    ):
        yield


@contextlib.contextmanager
def interpreted_gpu(**options):
    """Run GPU kernels on the CPU, step by step: correct but slow.

    Args:
        options: options of `plgpu.InterpretGPUParams`, such as ``detect_races=True``.
    """
    with (
        _interpreting("gpu"),
        plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**options)),
    ):
        yield


@contextlib.contextmanager
def _interpreting(name: str):
    token = _interpreted.set(name)
    try:
        yield
    finally:
        _interpreted.reset(token)
