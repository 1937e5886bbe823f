"""Array operations with accelerator kernels; stands on jax alone."""

from pallas_kernels.delta_rule import delta_product, delta_rule

__all__ = ["delta_product", "delta_rule"]
