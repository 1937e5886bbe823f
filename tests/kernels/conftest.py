"""Settings of the kernels' tests."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def optimized_ahead_of_time():
    """The TPU and GPU compilers, in processes of their own, optimise as for a user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
        yield
