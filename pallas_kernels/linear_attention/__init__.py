"""Linear attention with a decay per head or per channel."""

from pallas_kernels.linear_attention.api import gated_linear_attention

__all__ = ["gated_linear_attention"]
