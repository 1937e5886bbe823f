"""The block sizes of the TPU kernels, where more than one size works.

The table is block_sizes.json, by kernel and chip; `scripts/tune_kernels.py` writes it
from the estimated cycles of every candidate. A kernel uses a smaller size where there
is less work or too little VMEM.
"""

import contextlib
import contextvars
import json
import pathlib
import types
from collections.abc import Mapping

from pallas_kernels import platform

PATH = pathlib.Path(__file__).with_name("block_sizes.json")
_TABLE: dict[str, dict[str, dict[str, int]]] = json.loads(PATH.read_text())
_tried: contextvars.ContextVar[Mapping[str, int]] = contextvars.ContextVar(
    "tried", default=types.MappingProxyType({})
)


def of(kernel: str) -> dict[str, int]:
    """The sizes of a kernel on the chip that it is traced for.

    heads: heads in a grid step, or groups of 128 channels of the selective scan.
    in_turns: heads whose stages are emitted in turns.
    unroll: blocks of 8 tokens in an iteration of the loop that computes the states.
    """
    return _TABLE[kernel][chip()] | dict(_tried.get())


def chip() -> str:
    """The chip of the table that is most like the one in use; for a v5p, v5e."""
    return "v5e" if platform.device_kind().startswith("TPU v5") else "v6e"


@contextlib.contextmanager
def trying(sizes: Mapping[str, int]):
    """Trace kernels with these sizes instead of the table's.

    Programs that are already compiled keep their sizes.
    """
    token = _tried.set(sizes)
    try:
        yield
    finally:
        _tried.reset(token)
