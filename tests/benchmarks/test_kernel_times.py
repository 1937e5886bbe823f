"""Timing the kernels on a device; figures of a CPU mean nothing, but are some."""

import pytest

from benchmarks import kernel_times
from benchmarks.kernel_cycles import VARIANTS

SMALL = {"B": 1, "T": 16, "H": 1}


@pytest.mark.parametrize(
    "variant",
    (
        "delta rule, forward and backward",
        "linear attention, a channel's decay",
        "selective scan",
    ),
)
def test_a_form_has_figures_or_a_reason(variant):
    assert variant in VARIANTS
    found = kernel_times.measure(variant, SMALL, turns=2, kind="NVIDIA H200")
    assert list(sorted(found)) == sorted(kernel_times.FORMS)
    for form in ("pallas_tpu", "pallas_gpu"):
        assert "cannot run with implementation" in found[form]
    assert found["xla"]["nanoseconds"] > 0
    assert found["xla"]["gigabytes_per_second"] > 0
    assert 0 <= found["xla"]["share_of_roofline"] < 1


def test_share_of_the_roofline():
    second = kernel_times.share("NVIDIA H200", flops=989e12, moved=1, seconds=2)
    assert second == 0.5
    assert kernel_times.share("NVIDIA H200", flops=1, moved=4.8e12, seconds=2) == 0.5
    assert kernel_times.share("cpu", flops=1, moved=1, seconds=1) is None
