"""Array operations with accelerator kernels; depends on JAX alone."""

from pallas_kernels.delta_rule import delta_product, delta_rule
from pallas_kernels.linear_attention import gated_linear_attention
from pallas_kernels.paged_attention import merge_partials, paged_attention
from pallas_kernels.selective_scan import selective_scan

__all__ = [
    "delta_product",
    "delta_rule",
    "gated_linear_attention",
    "merge_partials",
    "paged_attention",
    "selective_scan",
]
