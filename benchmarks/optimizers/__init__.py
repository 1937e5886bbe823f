"""Comparisons of optimizers on the same problems in one harness."""
