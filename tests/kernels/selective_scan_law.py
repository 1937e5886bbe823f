"""Run the selective scan with its gradients; its law is `recurrence_law.assert_law`."""

from functools import partial

import recurrence_law

import pallas_kernels
from benchmarks.cases import selective_scan as cases

run = partial(recurrence_law.run, operation=pallas_kernels.selective_scan)


def small(B=2, T=150, E=24, N=4):
    """A small shape that is no multiple of any block size."""
    return cases.Shape(B, T, E, N)
