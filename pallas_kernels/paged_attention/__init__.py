"""Attention over a cache of keys and values kept in pages."""

from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.paged_attention.partials import merge_partials

__all__ = ["merge_partials", "paged_attention"]
