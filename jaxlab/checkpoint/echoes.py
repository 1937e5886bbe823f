"""Silence for what orbax and TensorStore say of a failed save.

When one array cannot be written, orbax logs the failure in each of its threads and
closes its event loop, to which the writes of the other arrays still report. That is
thousands of lines of tracebacks beside the one sentence that says what happened.
"""

import functools
import logging
import sys


@functools.cache
def silence_echoes() -> None:
    """Show no such traceback from now on; everything else is shown as before."""
    shown = sys.unraisablehook

    def hook(unraisable):
        # The traceback begins where TensorStore called Python.
        trace = unraisable.exc_traceback
        start = trace and trace.tb_frame.f_code.co_name
        if unraisable.exc_type is not RuntimeError or start != "call_soon_threadsafe":
            shown(unraisable)

    sys.unraisablehook = hook
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record is not of an exception that orbax also raises."""
    of_orbax = "orbax" in record.pathname or "orbax" in str(record.msg)
    return not (record.exc_info and of_orbax)
