"""How much the TPU kernels take at once, where more than one size works.

The table is block_sizes.json, by kernel and chip; `scripts/tune_kernels.py` writes it,
from the estimated cycles of every candidate. A kernel takes less where there is less to
take or VMEM has no room for it.
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

    heads: of a grid step, or groups of 128 channels of the selective scan.
    in_turns: heads whose stages are emitted in turns.
    unroll: blocks of 8 tokens in an iteration of the loop that makes the states.
    """
    return _TABLE[kernel][chip()] | dict(_tried.get())


def chip() -> str:
    """The chip of the table that is most like the one in use: v5p is a v5e in this."""
    return "v5e" if platform.device_kind().startswith("TPU v5") else "v6e"


@contextlib.contextmanager
def trying(sizes: Mapping[str, int]):
    """Trace kernels with these sizes instead of the table's.

    What is compiled already keeps its own.
    """
    token = _tried.set(sizes)
    try:
        yield
    finally:
        _tried.reset(token)
