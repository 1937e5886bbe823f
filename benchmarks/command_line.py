"""What the benchmarks' commands share: errors in a sentence, and names by a glob."""

import contextlib
import fnmatch
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import Any


@contextlib.contextmanager
def sentences() -> Iterator[None]:
    """End the program with a sentence on stderr where there would be a traceback.

    With status 1 after an error, 130 after Ctrl-C and 143 after SIGTERM, both of which
    clean up on the way.
    """
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(number: int, _frame: Any) -> None:
    print("Stopped.", file=sys.stderr)
    sys.exit(128 + number)


def matching(names: Iterable[str], only: str) -> list[str]:
    """The names that match the glob of an option --only.

    Raises:
        ValueError: none does.
    """
    found = fnmatch.filter(names, only)
    if not found:
        raise ValueError(f"--only {only!r} matches none of {', '.join(names)}.")
    return found
