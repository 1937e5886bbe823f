"""Settings for all tests: strict types and 8 virtual CPU devices."""

import gc
import itertools
import json
import os
import pathlib
import shutil
import subprocess

# Must be set before JAX starts its backends.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# LLVM takes most of the tests' time; without its optimisations a program compiles in
# half the time. XLA's own passes, such as fusion, still run. This is set in the
# environment so that it also applies to processes that tests start; set it to 0 to
# test with all optimisations.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Processes that tests start share the compiled programs too.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(
    pathlib.Path(__file__).parent.parent / ".cache" / "jax"
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Linux allows a process 65,530 memory mappings and it dies at one more. A compiled
# function has about a hundred, and the tests of one file may compile hundreds.
MOST_MAPPINGS = 30_000
BETWEEN_COUNTS = 5  # tests; reading the mappings takes some milliseconds
MAPPINGS = pathlib.Path("/proc/self/maps")

# Files that test the compiler itself, on programs compiled as for a user.
OPTIMIZED = {"test_compiler.py"}


@pytest.fixture(autouse=True, scope="module")
def optimizations(request):
    """Compile as for a user in the files that test the compiler."""
    fewer = jax.config.read("jax_disable_most_optimizations")
    if not fewer or request.path.name not in OPTIMIZED:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()  # the caches ignore this setting
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture(scope="session")
def optimized():
    """Options of `jax.jit` that compile as for a user, for programs that run long."""
    return {
        "xla_backend_optimization_level": 3,
        "xla_llvm_disable_expensive_passes": False,
    }


# Tests that take long by these measurements have the mark `slow`, which `make test`
# leaves out. `python -m pytest -n 2 --record-durations` measures them anew.
DURATIONS = pathlib.Path(__file__).parent / "durations.json"
QUICK = 1.0  # seconds; a test that takes more is in the file, and slow
QUICKEST = 2.5  # seconds; up to it, the quickest case of a test is not slow


def pytest_addoption(parser):
    parser.addoption(
        "--record-durations",
        action="store_true",
        help=f"write the seconds of the tests that take more than {QUICK}",
    )
    parser.addoption(
        "--record-compiled",
        action="store_true",
        help="compile every kernel for TPU and GPU and write what the compilers said",
    )


def pytest_collection_modifyitems(items):
    """Mark the tests that were measured to be slow, all but the quickest of a law."""
    seconds = json.loads(DURATIONS.read_text())
    laws = [(item, _law(item)) for item in items]
    laws = [pair for pair in laws if pair[0].get_closest_marker("slow") is None]
    quickest: dict[tuple, float] = {}
    for item, law in laws:
        taken = seconds.get(item.nodeid, 0.0)
        quickest[law] = min(taken, quickest.get(law, taken))
    for item, law in laws:
        taken = seconds.get(item.nodeid, 0.0)
        of_operation = law[1] is not None
        kept = taken == quickest[law] and (of_operation or taken <= QUICKEST)
        if taken > QUICK and not kept:
            item.add_marker(pytest.mark.slow)


def _law(item):
    """A test's name without its case, and the operation that it is a law of, if any.

    Of each law of an operation a case is quick, however long it takes.
    """
    op = item.callspec.params.get("op") if hasattr(item, "callspec") else None
    return item.nodeid.partition("[")[0], getattr(op, "call", None)


def pytest_terminal_summary(terminalreporter, config):
    """Write what the tests took, if that was asked for."""
    if not config.getoption("--record-durations"):
        return
    seconds: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration"):
                before = seconds.get(report.nodeid, 0.0)
                seconds[report.nodeid] = before + report.duration
    option = config.option
    whole = not (option.file_or_dir or option.markexpr or option.keyword)
    others = {} if whole else json.loads(DURATIONS.read_text())
    measured = {name: round(x, 1) for name, x in (others | seconds).items()}
    long = {name: x for name, x in sorted(measured.items()) if x > QUICK}
    DURATIONS.write_text(json.dumps(long, indent=0) + "\n")


tests_run = itertools.count(1)


@pytest.fixture(autouse=True)
def bounded_mappings():
    """Drop the compiled functions once there are many."""
    yield
    if next(tests_run) % BETWEEN_COUNTS or not MAPPINGS.exists():
        return
    if MAPPINGS.read_text().count("\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def key():
    """A fixed PRNG key; split it for more."""
    return jax.random.key(20260101)


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
