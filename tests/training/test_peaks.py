"""Peak operations per second, by the kind of device."""

import types

import jax
import pytest

from jaxlab.training import peaks
from jaxlab.training.peaks import peak_flops


@pytest.mark.parametrize(
    "kind, tera",
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_by_device_kind(kind, tera):
    device = types.SimpleNamespace(platform="other", device_kind=kind)
    assert peak_flops(device) == (None if tera is None else tera * 1e12)


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite"])
def test_peaks_agree_with_those_in_jax(kind):
    from jax._src import tpu_info

    version = tpu_info.chip_version_from_device_kind(kind)
    info = tpu_info.get_tpu_info_for_chip(version, 1)
    chip = info.bf16_ops_per_second * version.num_physical_tensor_cores_per_chip
    device = types.SimpleNamespace(platform="tpu", device_kind=kind)
    assert peak_flops(device) == pytest.approx(chip, rel=0.01)  # theirs are rounded


def test_virtual_devices_share_the_cores_of_the_cpu(monkeypatch):
    devices = jax.devices()
    measured = peak_flops(devices[0]) * len(devices)
    assert 1e9 < measured < 1e14
    assert peak_flops(devices[-1]) * len(devices) == measured  # measured once
    monkeypatch.setattr(peaks, "_measured_cpu_flops", lambda: 8e9)
    assert peak_flops(devices[0]) == 8e9 / len(devices)
