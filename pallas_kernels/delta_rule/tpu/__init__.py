"""The delta rule as TPU kernels."""

from pallas_kernels.delta_rule.tpu.operation import fused
from pallas_kernels.delta_rule.tpu.sizes import unsupported

__all__ = ["fused", "unsupported"]
