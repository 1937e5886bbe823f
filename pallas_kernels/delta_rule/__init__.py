"""The gated delta rule and its generalisation to several steps per token."""

from pallas_kernels.delta_rule.api import delta_product, delta_rule

__all__ = ["delta_product", "delta_rule"]
