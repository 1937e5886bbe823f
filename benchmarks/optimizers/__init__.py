"""Optimizers beside each other on one problem, in one harness."""
