"""Settings for the tests of the kernels."""

import pytest
from recurrences import RECURRENCES


@pytest.fixture(autouse=True, scope="module")
def optimized_ahead_of_time():
    """Let the TPU and GPU compilers, in their own processes, compile as for a user."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR"):
            patch.delenv(name, raising=False)
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Put the laws of a recurrence together, which share its compiled programs.

    A process then has few of them at a time, and two processes few in common. Of the
    variants of an operation, the first that a law has is quick, and the others slow.
    """
    places = [i for i, item in enumerate(items) if _recurrence(item) is not None]
    first = {}
    for i in places:
        op = _recurrence(items[i])
        if first.setdefault((items[i].function, op.call), op) is not op:
            items[i].add_marker(pytest.mark.slow)
    laws = sorted(
        (items[i] for i in places),
        key=lambda item: (
            "_tpu" in item.path.name,
            RECURRENCES.index(_recurrence(item)),
        ),
    )
    for i, law in zip(places, laws, strict=True):
        items[i] = law


def _recurrence(item):
    """The operation of a law; None for other tests."""
    op = item.callspec.params.get("op") if hasattr(item, "callspec") else None
    return op if any(op is known for known in RECURRENCES) else None
