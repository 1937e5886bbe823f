"""Settings under which every test runs: strict types, 8 virtual CPU devices."""

import gc
import os
import pathlib

# Must be set before JAX starts its backends.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest

CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Linux gives a process 65,530 memory mappings, and dies of one more. A compiled
# function holds eleven, so a worker with a thousand tests behind it comes near.
MOST_MAPPINGS = 30_000
MAPPINGS = pathlib.Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="module")
def bounded_mappings():
    """Forgets the compiled functions after a test file once there are many."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_text().count("\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def key():
    """A fixed PRNG key; split it for more."""
    return jax.random.key(20260101)
