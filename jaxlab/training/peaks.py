"""The most floating-point operations per second that devices can do."""

import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Dense bfloat16 operations per second of one JAX device, by the start of device_kind;
# longer names first where one starts another.
# TPU: "peak compute per chip" in docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}.
# A TPU7x chip is two devices; the others are one.
# NVIDIA: data sheets of the A100, H100, H200 and DGX B200/GB200, without sparsity.
PEAK_FLOPS = {
    "TPU v4 lite": 137e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6": 918e12,  # v6e
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
}


def peak_flops(device: Any) -> float | None:
    """Return the most floating-point operations per second that one device can do.

    Args:
        device: one of jax.devices(). TPU and GPU peaks are dense bfloat16 from a table.
          A CPU's is measured with a float32 matrix product and shared out among the
          local CPU devices, all of which run on the same cores.

    Returns:
        Operations per second, or None for a kind of device that is not in the table.
    """
    if device.platform == "cpu":
        return _measured_cpu_flops() / len(jax.local_devices(backend="cpu"))
    for kind, flops in PEAK_FLOPS.items():
        if device.device_kind.startswith(kind):
            return flops
    return None


@functools.cache
def _measured_cpu_flops() -> float:
    n = 1024
    x = jax.device_put(np.ones((n, n), np.float32), jax.local_devices(backend="cpu")[0])
    product = jax.jit(jnp.matmul).lower(x, x).compile()
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds)
