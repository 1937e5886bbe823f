"""Rows that read a text from end to end, segment after segment.

For models that carry a state from one segment to the next. Row r of R starts r / R of
the way into the corpus, continues where its last segment stopped, and wraps around at
the end. Segment n is a pure function of n, so the position is one number.
"""

import sys

import grain
import numpy as np
from jaxtyping import Int32

from jaxlab.data.loader import READ_AHEAD, DocumentSource


class Streams:
    """Segments by number: ``streams[n]`` is int32 [rows, length + 1].

    Segment n has the tokens ``n length .. n length + length`` of each row, so that
    consecutive segments share one: what one predicts last, the next reads first.

    Args:
        documents: `Corpus.split("train")`, `ArrayDocuments` or the like; separators
            are part of what is read.
        rows: rows to read side by side.
        length: predictions of a segment.

    Raises:
        ValueError: rows or length below 1, or nothing to read.
    """

    def __init__(self, documents: DocumentSource, *, rows: int, length: int):
        for name, value in (("rows", rows), ("length", length)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        self.tokens = int(documents.offsets[-1])
        if self.tokens < 2:
            raise ValueError(
                f"There is nothing to predict in these {len(documents.offsets) - 1} "
                "documents; with a corpus of a single file nothing is held out, so "
                "build it from two or more."
            )
        self.rows, self.length = rows, length
        self._documents = documents

    def __len__(self) -> int:
        return sys.maxsize

    @property
    def segments_a_pass(self) -> int:
        """Segments until the rows together have read everything at least once."""
        longest = -(-self.tokens // self.rows)
        return -(-longest // self.length)

    def __getitem__(self, index: int) -> Int32[np.ndarray, "rows length+1"]:
        ranges = []
        for row in range(self.rows):
            start = row * self.tokens // self.rows + index * self.length
            ranges.extend(_wrapped(start, self.length + 1, self.tokens))
        tokens = np.concatenate(self._documents.read(ranges))
        return tokens.reshape(self.rows, self.length + 1)


def stream_segments(
    documents: DocumentSource, *, rows: int, length: int
) -> grain.DatasetIterator:
    """Return an iterator over the segments of `Streams`, which are made ahead.

    `iterator.get_state()` is a small dict for JSON; `set_state` continues from it.

    Args:
        documents, rows, length: those of `Streams`.
    """
    source = Streams(documents, rows=rows, length=length)
    return iter(grain.MapDataset.source(source).to_iter_dataset(READ_AHEAD))


def _wrapped(start: int, count: int, total: int):
    """Yield half-open ranges that hold `count` places from `start`, modulo `total`."""
    start %= total
    while count:
        stop = min(start + count, total)
        yield start, stop
        start, count = 0, count - (stop - start)
