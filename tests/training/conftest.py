"""Fixtures of the training tests."""

import shutil
import subprocess

import pytest


@pytest.fixture
def small_disk(tmp_path):
    """A directory on a disk of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount).returncode != 0:
        pytest.skip("a small tmpfs cannot be mounted here (root is needed)")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)
