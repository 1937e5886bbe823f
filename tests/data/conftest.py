"""Fixtures of the data tests."""

import numpy as np
import pytest


@pytest.fixture
def texts(tmp_path):
    """A directory of 40 text files of differing lengths, and what they hold."""
    rng = np.random.default_rng(0)
    expected = {}
    for i in range(40):
        name = f"{'ab'[i % 2]}/file{i}.txt"
        expected[name] = "".join(rng.choice(list("abc é\n"), 1 + 7 * i))
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(expected[name])
    return tmp_path / "texts", expected
