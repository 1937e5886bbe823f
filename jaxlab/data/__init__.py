"""Tokenizers, corpora, the resumable loader and synthetic tasks."""

from jaxlab.data.building import CorpusConfig, build
from jaxlab.data.corpus import Corpus, Documents, open_corpus
from jaxlab.data.loader import (
    ArrayDocuments,
    Batch,
    DocumentSource,
    heldout_batches,
    packed_batches,
)
from jaxlab.data.ngrams import ngram_bits_per_byte
from jaxlab.data.streams import Streams, stream_segments
from jaxlab.data.synthetic import (
    AssociativeRecall,
    GroupWordProblem,
    InductionHeads,
    NeedleInHaystack,
    SelectiveCopying,
    Task,
    group_table,
    task_batches,
)
from jaxlab.data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    continuation,
    load_tokenizer,
)

__all__ = [
    "ArrayDocuments",
    "AssociativeRecall",
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "CorpusConfig",
    "DocumentSource",
    "Documents",
    "GroupWordProblem",
    "HuggingFaceTokenizer",
    "InductionHeads",
    "NeedleInHaystack",
    "SelectiveCopying",
    "Streams",
    "Task",
    "build",
    "continuation",
    "group_table",
    "heldout_batches",
    "load_tokenizer",
    "ngram_bits_per_byte",
    "open_corpus",
    "packed_batches",
    "stream_segments",
    "task_batches",
]
