"""How files, documents and blocks of text are divided between the splits.

By hashes of names, so that it is the same everywhere, and nothing moves when something
else comes or goes.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

from jaxlab.data.corpus import SPLITS

LEAST, MOST = 2**10, 2**20  # bytes of a block


def assign_splits(names: Iterable[str], fraction: float) -> list[str]:
    """Return the split of each name; neither is empty where there are two names.

    Args:
        names: at least one.
        fraction: the share of names to hold out, in (0, 1).
    """
    scores = np.fromiter(map(_score, names), float)
    held_out = scores < fraction
    if not held_out.any():
        held_out[scores.argmin()] = True
    if held_out.all():
        held_out[scores.argmax()] = False
    return [SPLITS[int(held)] for held in held_out]


def _score(name: str) -> float:
    """A number in [0, 1] that is even over names."""
    data = name.encode(errors="surrogateescape")  # a file's name may be any bytes
    return int.from_bytes(hashlib.sha256(data).digest()[:8]) / 2**64


def block_borders(text: bytes) -> list[int]:
    """Return where to cut a text into blocks, with its start and its end.

    A block has a 64th of the text, but at least `LEAST` and at most `MOST` bytes, and
    goes on to the end of its line where that is not as far again. A text shorter than
    two blocks is not cut.
    """
    size = min(max(len(text) // 64, LEAST), MOST)
    borders = [0]
    while len(text) - borders[-1] >= 2 * size:
        cut = borders[-1] + size
        line_end = text.find(b"\n", cut - 1, min(cut + size, len(text) - size))
        borders.append(line_end + 1 or _next_character(text, cut))
    return [*borders, len(text)]


def _next_character(text: bytes, position: int) -> int:
    """The first position from here on at which a character of UTF-8 begins."""
    while position < len(text) and text[position] & 0xC0 == 0x80:
        position += 1
    return position
