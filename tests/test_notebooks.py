"""The notebooks' cells run, in order; those tagged slow are left to a reader."""

import json
import pathlib

import jax
import numpy as np
import pytest

NOTEBOOKS = sorted(pathlib.Path(__file__).parent.parent.glob("notebooks/*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run(path, monkeypatch, capsys):
    monkeypatch.chdir(path.parent)
    scope = {}
    # A reader's JAX has its ordinary settings.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code" and "tags" not in cell["metadata"]:
                exec("".join(cell["source"]), scope)
    said = capsys.readouterr().out
    if path.stem == "delta_product":
        turns = np.cos(np.arange(1, 7) * 2 * np.pi / 3)
        printed = said.splitlines()[-1].strip("[]").split()
        np.testing.assert_allclose([float(x) for x in printed], turns, atol=2e-3)
