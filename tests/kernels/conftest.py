"""Settings for the tests of the kernels."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def optimized_ahead_of_time():
    """Let the TPU and GPU compilers, in their own processes, compile as for a user."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR"):
            patch.delenv(name, raising=False)
        yield
