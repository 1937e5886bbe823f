"""Settings for the tests of the kernels."""

import fcntl
import json
import pathlib

import pytest
from recurrences import RECURRENCES

from pallas_kernels import aot

# What the compilers for TPU and GPU said of the programs of each test, by the programs'
# digests: compiling takes minutes, and says the same of an equal program.
# `python -m pytest tests/kernels --record-compiled` compiles them all and writes it.
COMPILED = pathlib.Path(__file__).parent / "compiled.json"


@pytest.fixture(autouse=True, scope="module")
def optimized_ahead_of_time():
    """Let the TPU and GPU compilers, in their own processes, compile as for a user."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture
def compile_jobs(request):
    """`aot.compile_jobs`, which compiles what is not in the record."""

    def reports(jobs, estimate=True):
        anew = request.config.getoption("--record-compiled")
        said = {} if anew else json.loads(COMPILED.read_text()).get(test, {})
        digests = aot.digests(jobs, estimate)
        pairs = list(zip(jobs, digests, strict=True))
        unknown = [job for job, digest in pairs if digest not in said]
        compiled = iter(aot.compile_jobs(unknown, estimate))
        found = [
            aot.report_of(said[digest] | {"seconds": 0.0}, job.chip)
            if digest in said
            else next(compiled)
            for job, digest in pairs
        ]
        if anew:
            _record(test, dict(zip(digests, found, strict=True)))
        return found

    test = request.node.nodeid
    return reports


def _record(test, reports):
    """Write the reports of a test that have no error."""
    said = {
        digest: {name: x for name, x in report._asdict().items() if name != "seconds"}
        for digest, report in reports.items()
        if report.error is None
    }
    with COMPILED.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        record = json.load(file) | {test: said}
        file.seek(0)
        file.truncate()
        file.write(json.dumps(dict(sorted(record.items())), indent=1) + "\n")


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
