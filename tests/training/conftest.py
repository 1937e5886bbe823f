"""Fixtures of the training tests."""

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
