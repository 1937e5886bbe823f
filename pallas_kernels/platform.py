"""Which hardware a computation is being traced for."""

import contextlib
import contextvars

import jax
from jax.experimental.pallas import tpu as pltpu

_interpreted = contextvars.ContextVar("interpreted", default=False)


def platform() -> str:
    """The platform of the mesh in use, else of the default device: cpu, gpu or tpu.

    A mesh may be of devices that are not here, to compile for them (`aot`).
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = jax.default_backend() if device is None else device.platform
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def runs_tpu_kernels() -> bool:
    """Whether TPU kernels can run here, or are interpreted."""
    return _interpreted.get() or platform() == "tpu"


@contextlib.contextmanager
def interpreted_tpu(**options):
    """Run TPU kernels on the CPU, step by step: right values at no speed.

    Args:
        options: of `pltpu.InterpretParams`, as ``detect_races=True``.
    """
    token = _interpreted.set(True)
    try:
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**options)):
            yield
    finally:
        _interpreted.reset(token)
