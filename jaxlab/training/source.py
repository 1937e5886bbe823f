"""Where batches come from: a corpus of text, or a synthetic task."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import grain
import jax
from jax.experimental import multihost_utils

from jaxlab import data
from jaxlab.data import Batch
from jaxlab.data.tokenizer import Tokenizer

Task = (
    data.GroupWordProblem
    | data.AssociativeRecall
    | data.SelectiveCopying
    | data.NeedleInHaystack
)


@dataclasses.dataclass(frozen=True)
class TextData:
    """Documents of a corpus, packed into rows."""

    corpus: data.CorpusConfig = data.CorpusConfig(directory="runs/data/stdlib")
    sequence_length: int = 512  # predictions a row
    eval_tokens: int | None = 131_072  # held-out predictions scored; None: all


@dataclasses.dataclass(frozen=True)
class TaskData:
    """Endless samples of a synthetic task."""

    task: Task = data.GroupWordProblem()
    eval_rows: int = 512  # test samples an evaluation


class Source(NamedTuple):
    """Data opened for a run.

    Attributes:
        train: endless batches whose position can be saved.
        heldout: makes a fresh iterator over the batches of one evaluation.
        row_length: positions a row.
        vocab_size: ids that the model must know.
        tokenizer: None for a task.
        baselines: bits per byte of simpler models on the held-out data.
    """

    train: grain.DatasetIterator
    heldout: Callable[[], Iterable[Batch]]
    row_length: int
    vocab_size: int
    tokenizer: Tokenizer | None
    baselines: dict[str, float]


def open_source(
    cfg: TextData | TaskData, batch_size: int, seed: int, *, resumes: bool = False
) -> Source:
    """Open the data.

    The first process builds a corpus that is not there yet. A run that resumes takes
    the corpus as it was built, even if the text has changed since.
    """
    share = dict(
        batch_size=batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    if isinstance(cfg, TextData):
        return _open_text(cfg, share, seed, resumes)
    batches = -(-cfg.eval_rows // batch_size)
    return Source(
        train=data.task_batches(cfg.task, seed=seed, split="train", **share),
        heldout=lambda: itertools.islice(
            data.task_batches(cfg.task, seed=seed, split="test", **share), batches
        ),
        row_length=cfg.task.length,
        vocab_size=cfg.task.vocab_size,
        tokenizer=None,
        baselines={},
    )


def _open_text(cfg: TextData, share: dict, seed: int, resumes: bool) -> Source:
    if jax.process_index() == 0 and not resumes:
        data.build(cfg.corpus)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("corpus built")
    corpus = data.open_corpus(cfg.corpus.directory)
    length = cfg.sequence_length
    baselines = {}
    if cfg.corpus.tokenizer == "bytes":
        baselines = {
            name: data.ngram_bits_per_byte(corpus, order)
            for name, order in (("unigram", 1), ("bigram", 2))
        }
    return Source(
        train=data.packed_batches(
            corpus.split("train"), sequence_length=length, seed=seed, **share
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
        baselines=baselines,
    )
