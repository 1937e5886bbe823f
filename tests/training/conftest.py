"""Fixtures of the training tests."""

import shutil
import subprocess

import numpy as np
import pytest

from jaxlab.data import CorpusConfig


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus of 40 short documents made of five words."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i in range(40):
        words = rng.choice(["def ", "return ", "x ", "= ", "1\n"], rng.integers(5, 60))
        (folder / f"{i}.txt").write_text("".join(words))
    return CorpusConfig(directory=str(folder / "corpus"), sources=(str(folder),))


@pytest.fixture
def small_disk(tmp_path):
    """A directory on a disk of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount).returncode != 0:
        pytest.skip("a small tmpfs cannot be mounted (this needs root)")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)
