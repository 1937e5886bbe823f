"""Bits per byte of n-gram counts: what a model of text has to beat."""

import numpy as np
from jaxtyping import Int

from jaxlab.data.corpus import Corpus

TOKENS_AT_ONCE = 2**20


def ngram_bits_per_byte(corpus: Corpus, order: int) -> float:
    """Return held-out bits per byte under n-gram counts of the training split.

    p(b | a) = (count(a, b) + 1) / (count(a) + vocab_size), for order 1 without a. The
    closing separator of each document is predicted too, so the sum of -log2 p has more
    terms than the number of bytes by which it is divided.

    Args:
        corpus: of byte tokens.
        order: 1 for unigrams, 2 for bigrams.

    Raises:
        ValueError: the tokenizer is not of bytes, the order is neither 1 nor 2, or
            nothing is held out.
    """
    if corpus.tokenizer.fingerprint != "bytes":
        raise ValueError(
            "n-gram bits per byte are counted over bytes, but the corpus has the "
            f"tokenizer {corpus.tokenizer.name!r}; build one with tokenizer='bytes'."
        )
    if order not in (1, 2):
        raise ValueError(f"order={order} is not 1 (unigrams) or 2 (bigrams).")
    if corpus.split("heldout").bytes == 0:
        raise ValueError(
            "Nothing is held out of this corpus, because it has one file; build it "
            "from two or more."
        )
    train, heldout = (_pair_counts(corpus, split) for split in ("train", "heldout"))
    if order == 1:
        train, heldout = (counts.sum(0, keepdims=True) for counts in (train, heldout))
    smoothed = train + 1
    bits = -np.log2(smoothed / smoothed.sum(1, keepdims=True))
    return float((heldout * bits).sum() / corpus.split("heldout").bytes)


def _pair_counts(corpus: Corpus, split: str) -> Int[np.ndarray, "vocab vocab"]:
    """Count the pairs (token, next token) inside the documents of a split."""
    documents, vocab = corpus.split(split), corpus.vocab_size
    counts = np.zeros(vocab * vocab, np.int64)
    for start in range(0, documents.tokens, TOKENS_AT_ONCE):
        stop = min(start + TOKENS_AT_ONCE + 1, documents.tokens)
        tokens = documents.read([(start, stop)])[0]
        counts += np.bincount(tokens[:-1] * vocab + tokens[1:], minlength=vocab**2)
    counts = counts.reshape(vocab, vocab)
    # Text holds no separators: two in a row are where two documents meet.
    counts[corpus.tokenizer.separator, corpus.tokenizer.separator] = 0
    return counts
