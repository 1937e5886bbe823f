"""Shared by the GPU kernels."""
