"""Sources of batches: a corpus of text, or a synthetic task."""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
from jax.experimental import multihost_utils

from jaxlab import data
from jaxlab.checkpoint import CheckpointError
from jaxlab.data import Batch
from jaxlab.data.tokenizer import Tokenizer

AnyTask = (
    data.GroupWordProblem
    | data.AssociativeRecall
    | data.SelectiveCopying
    | data.InductionHeads
    | data.NeedleInHaystack
)


STDLIB = "runs/data/stdlib"
"""The directory of the default corpus."""

TOKENIZER = "tokenizer.json"
"""The name of a tokenizer's file, in a corpus and in a run."""


BYTES_PER_TOKEN = 20
"""Of a batch: inputs, targets, documents, weights and bytes, of four bytes each."""


@dataclasses.dataclass(frozen=True)
class TextData:
    """Documents of a corpus, packed into rows."""

    corpus: data.CorpusConfig = data.CorpusConfig(directory=STDLIB)
    sequence_length: int = 512  # predictions a row
    eval_tokens: int | None = 131_072  # held-out predictions scored; None: all

    def __post_init__(self):
        for name in ("sequence_length", "eval_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.{name}={value} must be at least 1.")
        if self.corpus.sources and self.corpus.directory == STDLIB:
            raise ValueError(
                f"{STDLIB} is the place of the standard library's corpus; give your "
                "own another directory, such as runs/data/mine."
            )


@dataclasses.dataclass(frozen=True)
class TaskData:
    """Endless samples of a synthetic task."""

    task: AnyTask = data.GroupWordProblem()
    eval_rows: int = 512  # test samples an evaluation, up to whole batches

    def __post_init__(self):
        if self.eval_rows < 1:
            raise ValueError(f"data.eval_rows={self.eval_rows} must be at least 1.")


class TrainBatches:
    """Endless batches whose position is saved together with what it counts.

    Args:
        batches: a grain iterator.
        counts: the data, the rows and their order; a position among others would be
            meaningless, so restoring it there is an error.
    """

    def __init__(self, batches: grain.DatasetIterator, counts: dict[str, Any]):
        self._batches = batches
        self._counts = json.loads(json.dumps(counts))

    def __next__(self) -> Batch:
        return next(self._batches)

    @property
    def taken(self) -> int:
        """Batches taken since the beginning of the run."""
        return self._batches.get_state()["next_index"]

    def get_state(self) -> dict[str, Any]:
        return {"counts": self._counts, "position": self._batches.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        check_same_data(state["counts"], self._counts)
        self._batches.set_state(state["position"])


def check_same_data(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse a position among other data than it was saved for.

    Raises:
        CheckpointError: what differs, with both values.
    """
    differing = [
        f"{name} was {saved.get(name)!r} and is {value!r}"
        for name, value in now.items()
        if saved.get(name) != value
    ]
    if differing:
        raise CheckpointError(
            f"The run was saved with other data: {'; '.join(differing)}. Continue it "
            "with the same, or start a new run from its parameters (init_from)."
        )


class Source(NamedTuple):
    """Data opened for a run.

    Attributes:
        train: endless batches whose position can be saved.
        heldout: makes a fresh iterator over the batches of one evaluation.
        row_length: positions a row.
        vocab_size: ids that the model must know.
        tokenizer: None for a task.
        baselines: bits per byte of simpler models on the held-out data.
        keeps: files that a run's directory keeps a copy of, by their names there.
    """

    train: TrainBatches
    heldout: Callable[[], Iterable[Batch]]
    row_length: int
    vocab_size: int
    tokenizer: Tokenizer | None
    baselines: dict[str, float]
    keeps: Mapping[str, Path] = {}


def open_source(
    cfg: TextData | TaskData, batch_size: int, seed: int, *, resumes: bool = False
) -> Source:
    """Open the data.

    The first process builds a corpus that is not there yet. A run that resumes takes
    the corpus as it was built, even if the text has changed since.
    """
    length = cfg.sequence_length if isinstance(cfg, TextData) else cfg.task.length
    _check_memory(batch_size, length)
    share = dict(
        batch_size=batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    if isinstance(cfg, TextData):
        return _open_text(cfg, share, seed, resumes)
    batches = -(-cfg.eval_rows // batch_size)
    return Source(
        train=TrainBatches(
            data.task_batches(cfg.task, seed=seed, split="train", **share),
            {"task": repr(cfg.task), "batch_size": batch_size, "seed": seed},
        ),
        heldout=lambda: itertools.islice(
            data.task_batches(cfg.task, seed=seed, split="test", **share), batches
        ),
        row_length=cfg.task.length,
        vocab_size=cfg.task.vocab_size,
        tokenizer=None,
        baselines={},
    )


def _check_memory(rows: int, length: int) -> None:
    """Refuse batches that this machine's memory cannot hold."""
    own = rows // jax.process_count()
    needed = own * length * BYTES_PER_TOKEN
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(
            f"A batch of {own} rows of {length} tokens in a process needs "
            f"{needed / 1e9:,.0f} GB of memory for the tokens alone, and this machine "
            f"has {there / 1e9:,.0f} GB; choose fewer rows."
        )


def _open_text(cfg: TextData, share: dict, seed: int, resumes: bool) -> Source:
    if jax.process_index() == 0 and not resumes:
        data.build(cfg.corpus)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("corpus built")
    corpus = data.open_corpus(cfg.corpus.directory)
    if len(corpus.split("heldout")) == 0:
        raise ValueError(
            f"{cfg.corpus.directory} holds nothing out, so that nothing can be "
            "evaluated; build it anew from two files, two rows or 2 KiB of text."
        )
    length = cfg.sequence_length
    tokenizer = corpus.directory / TOKENIZER
    return Source(
        train=TrainBatches(
            data.packed_batches(
                corpus.split("train"), sequence_length=length, seed=seed, **share
            ),
            {
                "corpus": corpus.fingerprint,
                "sequence_length": length,
                "batch_size": share["batch_size"],
                "seed": seed,
            },
        ),
        heldout=lambda: data.heldout_batches(
            corpus.split("heldout"),
            sequence_length=length,
            max_tokens=cfg.eval_tokens,
            **share,
        ),
        row_length=length,
        vocab_size=corpus.vocab_size,
        tokenizer=corpus.tokenizer,
        baselines=corpus.baselines,
        keeps={TOKENIZER: tokenizer} if tokenizer.is_file() else {},
    )
