"""The delta rule as GPU kernels."""

from pallas_kernels.delta_rule.gpu.operation import fused
from pallas_kernels.delta_rule.gpu.sizes import unsupported

__all__ = ["fused", "unsupported"]
