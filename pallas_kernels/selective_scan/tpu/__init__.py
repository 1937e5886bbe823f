"""The selective scan as fused TPU kernels."""

from pallas_kernels.selective_scan.tpu.operation import fused
from pallas_kernels.selective_scan.tpu.sizes import unsupported

__all__ = ["fused", "unsupported"]
