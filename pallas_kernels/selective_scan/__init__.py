"""The selective scan of Mamba: a diagonal recurrence with decays that vary by token."""

from pallas_kernels.selective_scan.api import selective_scan

__all__ = ["selective_scan"]
