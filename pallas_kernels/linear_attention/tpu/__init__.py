"""Gated linear attention as fused TPU kernels."""

from pallas_kernels.linear_attention.tpu.operation import fused
from pallas_kernels.linear_attention.tpu.sizes import unsupported

__all__ = ["fused", "unsupported"]
