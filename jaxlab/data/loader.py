"""Batches of packed documents whose position can be saved and restored exactly.

A batch is a pure function of its number: batch n of a seed is the same whenever and
wherever it is made, whatever was made before. So the position of an iterator is one
number, prefetching cannot change it, restoring reads nothing, and processes need no
coordination: each makes its own rows of the global batch n.
"""

import dataclasses
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from jaxtyping import Int

# Keys of a batch, each [batch, length]:
#   inputs       int32    token ids
#   targets      int32    the token that follows each input
#   weights      float32  1 where the target counts, else 0
#   segment_ids  int32    the document of the input, numbered from 0 in its row; -1 is
#                         padding
#   bytes        float32  bytes of text that the target stands for (0 for separators);
#                         only in batches of documents
Batch = dict[str, np.ndarray]

# A few threads make batches ahead, and only a few, since each element is a whole batch.
READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


class DocumentSource(Protocol):
    """Documents that the loader can read, such as `Documents` and `ArrayDocuments`."""

    token_bytes: Int[np.ndarray, "vocab"]

    @property
    def offsets(self) -> Int[np.ndarray, "documents+1"]: ...

    def read(
        self, ranges: Sequence[tuple[int, int]]
    ) -> list[Int[np.ndarray, "tokens"]]: ...


class ArrayDocuments:
    """Documents held in memory, for data that is not a corpus.

    Args:
        documents: int arrays [tokens], separators included.
        token_bytes: bytes of text that each token id stands for.
    """

    def __init__(
        self,
        documents: Iterable[Int[np.ndarray, "tokens"]],
        token_bytes: Int[np.ndarray, "vocab"],
    ):
        arrays = [np.asarray(document, np.int32) for document in documents]
        self.token_bytes = token_bytes
        self.offsets = np.cumsum([0] + [len(array) for array in arrays])
        self._tokens = np.concatenate([np.zeros(0, np.int32), *arrays])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Int[np.ndarray, "tokens"]:
        index = range(len(self))[index]
        return self._tokens[self.offsets[index] : self.offsets[index + 1]]

    def read(
        self, ranges: Sequence[tuple[int, int]]
    ) -> list[Int[np.ndarray, "tokens"]]:
        """Return the tokens in each half-open range of the stream."""
        return [self._tokens[start:stop] for start, stop in ranges]


def packed_batches(
    documents: DocumentSource,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_epochs: int | None = None,
) -> grain.DatasetIterator:
    """Return an iterator over training batches of packed documents.

    In every epoch the documents are laid end to end in a new order, and row r of the
    epoch predicts each of the tokens r*T+1 .. r*T+T of that stream from the one before,
    so consecutive rows share one token and every pair of neighbouring tokens is used
    once. Pairs that straddle two documents have weight 0. The rows of an epoch are then
    shuffled as well, because neighbouring rows of a long document are much alike.

    `iterator.get_state()` is a small dict for JSON; `set_state` with it continues with
    the batches that would have followed, on any number of processes.

    Args:
        documents: `Corpus.split("train")` or `ArrayDocuments`.
        batch_size: rows of the global batch; each process gets its share.
        sequence_length: T, the predictions a row.
        seed: determines both orders.
        process_index, process_count: select the share.
        num_epochs: epochs until the end, where padding fills the last batch; None goes
            on forever.

    Returns:
        A grain iterator of `Batch` with arrays [batch_size / process_count, T].
    """
    _check_positive(sequence_length=sequence_length)
    if num_epochs is not None:
        _check_positive(num_epochs=num_epochs)
    rows = _PackedRows(documents, sequence_length, seed=seed, num_epochs=num_epochs)
    return batches(
        rows,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
    )


def heldout_batches(
    documents: DocumentSource,
    *,
    batch_size: int,
    sequence_length: int,
    max_tokens: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Return an iterator over batches of documents in their order, each target once.

    Packed as in `packed_batches`; padding fills the last batch. Bits per byte are
    sum(weights * nats) / (log(2) * sum(weights * bytes)).

    Args:
        max_tokens: the most predictions (those of weight 0 count), in whole rows spread
            evenly over the documents, but at least one row; None takes all.
        The others are those of `packed_batches`.
    """
    _check_positive(sequence_length=sequence_length)
    if max_tokens is not None:
        _check_positive(max_tokens=max_tokens)
    rows = _PackedRows(
        documents,
        sequence_length,
        seed=None,
        num_epochs=1,
        max_rows=max_tokens and max(1, max_tokens // sequence_length),
    )
    return batches(
        rows,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
    )


class Rows(Protocol):
    """Rows of batches by number; rows past the end are padding."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def batches(
    rows: Rows, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Return an iterator over stacks of consecutive rows.

    Raises:
        ValueError: the batch does not divide over the processes.
    """
    _check_positive(batch_size=batch_size, process_count=process_count)
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index={process_index} is not in 0..{process_count - 1}, as it "
            f"must be with process_count={process_count}."
        )
    if batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} (of all processes together) does not divide by "
            f"process_count={process_count}; choose a multiple of it."
        )
    source = _Batches(rows, batch_size, process_index, process_count)
    return iter(grain.MapDataset.source(source).to_iter_dataset(READ_AHEAD))


@dataclasses.dataclass(frozen=True)
class _Batches:
    """Batch n holds the rows from n*batch_size on; a process stacks its share."""

    rows: Rows
    batch_size: int
    process_index: int
    process_count: int

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        share = self.batch_size // self.process_count
        first = index * self.batch_size + self.process_index * share
        rows = [self.rows[number] for number in range(first, first + share)]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


class _PackedRows:
    """Rows of T predictions cut from the documents laid end to end."""

    def __init__(
        self,
        documents: DocumentSource,
        sequence_length: int,
        *,
        seed: int | None,  # None keeps the documents in their order
        num_epochs: int | None,
        max_rows: int | None = None,  # rows of an epoch, spread over it
    ):
        offsets = documents.offsets
        pairs = int(offsets[-1]) - 1
        if pairs < 1:
            raise ValueError(
                f"There is nothing to predict in these {len(offsets) - 1} documents; "
                "with a corpus of a single file nothing is held out, so build it from "
                "two or more."
            )
        self._documents = documents
        self._length = sequence_length
        self._seed = seed
        self._pairs = pairs
        self._all_rows = -(-pairs // sequence_length)
        self._rows_per_epoch = min(self._all_rows, max_rows or self._all_rows)
        self._rows = (
            sys.maxsize if num_epochs is None else num_epochs * self._rows_per_epoch
        )
        self._token_bytes = documents.token_bytes.astype(np.float32)
        # The orders of the current epoch, and of one that a batch straddles too.
        self._epochs: dict[int, _Epoch] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._rows

    def _epoch(self, number: int) -> "_Epoch":
        with self._lock:
            if number not in self._epochs:
                if len(self._epochs) == 2:
                    self._epochs.pop(max(self._epochs, key=lambda n: abs(n - number)))
                self._epochs[number] = _Epoch.make(
                    self._documents.offsets, self._all_rows, self._seed, number
                )
            return self._epochs[number]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        T = self._length
        if index >= self._rows:
            tokens, owners = np.zeros(0, np.int32), np.zeros(0, np.int64)
        else:
            epoch = self._epoch(index // self._rows_per_epoch)
            rank = index % self._rows_per_epoch
            start = int(epoch.rows[rank * self._all_rows // self._rows_per_epoch]) * T
            stop = min(start + T, self._pairs) + 1
            tokens, owners = epoch.read(self._documents, start, stop)
        pairs = max(len(tokens) - 1, 0)
        row = {
            "inputs": np.zeros(T, np.int32),
            "targets": np.zeros(T, np.int32),
            "weights": np.zeros(T, np.float32),
            "segment_ids": np.full(T, -1, np.int32),
            "bytes": np.zeros(T, np.float32),
        }
        if pairs:
            row["inputs"][:pairs] = tokens[:-1]
            row["targets"][:pairs] = tokens[1:]
            row["weights"][:pairs] = owners[:-1] == owners[1:]
            row["segment_ids"][:pairs] = owners[:-1] - owners[0]
            row["bytes"][:pairs] = self._token_bytes[tokens[1:]]
        return row


@dataclasses.dataclass(frozen=True)
class _Epoch:
    """The orders of documents and rows in one epoch."""

    documents: Int[np.ndarray, "documents"]
    ends: Int[np.ndarray, "documents"]  # where each one ends in the epoch's stream
    rows: Int[np.ndarray, "rows"]

    @classmethod
    def make(cls, offsets: np.ndarray, rows: int, seed: int | None, number: int):
        count = len(offsets) - 1
        if seed is None:
            order, row_order = np.arange(count), np.arange(rows)
        else:
            stream = np.random.SeedSequence(seed, spawn_key=(number,))
            rng = np.random.Generator(np.random.Philox(stream))
            order, row_order = rng.permutation(count), rng.permutation(rows)
        return cls(order, np.cumsum(np.diff(offsets)[order]), row_order)

    def read(self, source: DocumentSource, start: int, stop: int):
        """Return tokens start..stop of the stream, and the rank of each's document."""
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right")
        ranges, owners, position = [], [], start
        for rank in range(first, last + 1):
            end = min(int(self.ends[rank]), stop)
            # The distance from the document's place in the epoch to that in the source.
            shift = int(source.offsets[self.documents[rank] + 1] - self.ends[rank])
            ranges.append((position + shift, end + shift))
            owners.append(end - position)
            position = end
        owners = np.repeat(np.arange(first, last + 1), owners)
        return np.concatenate(source.read(ranges)), owners


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
