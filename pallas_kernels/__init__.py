"""Array operations with accelerator kernels; imports jax only."""

from pallas_kernels.delta_rule import delta_product, delta_rule

__all__ = ["delta_product", "delta_rule"]
