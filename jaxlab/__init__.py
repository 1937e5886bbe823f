"""jaxlab: sequence models, optimizers and inference methods in pure JAX."""
