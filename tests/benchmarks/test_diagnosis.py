"""The eigenvalues that the diagnosis of MKOR reports."""

import numpy as np

from benchmarks.optimizers.diagnosis import least


def test_the_smallest_eigenvalue_of_each_factor():
    rng = np.random.default_rng(0)
    values = np.array([[0.9, 0.25, 1.0], [0.5, 0.75, 0.125]])
    bases = np.linalg.qr(rng.normal(size=(2, 3, 3)))[0]
    factors = (bases * values[:, None]) @ np.swapaxes(bases, -1, -2)
    found = least(np.eye(3) - factors)
    np.testing.assert_allclose(found, [0.25, 0.125], rtol=1e-12)
