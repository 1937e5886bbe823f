"""Settings for the tests of the kernels."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def optimized_ahead_of_time():
    """Let the TPU and GPU compilers, in their own processes, optimise as for a user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
        yield
