"""Streams: every row reads on where it stopped, around the end, from any position."""

import itertools
import json

import numpy as np
import pytest

from jaxlab.data import (
    ArrayDocuments,
    CorpusConfig,
    Streams,
    build,
    stream_segments,
)

LENGTHS = [1, 2, 3, 29, 8, 7, 1, 1, 64, 5, 16, 17, 2]
TOTAL = sum(LENGTHS)


@pytest.fixture
def documents():
    """Documents in which token i stands at place i, so that it tells where it is."""
    ends = np.cumsum(LENGTHS)
    arrays = [np.arange(end - n, end) for end, n in zip(ends, LENGTHS, strict=True)]
    return ArrayDocuments(arrays, np.ones(TOTAL))


@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize("length", [1, 10, 51, TOTAL - 1, TOTAL, 2 * TOTAL + 3])
def test_a_row_reads_on_from_its_own_start_around_the_end(documents, rows, length):
    """Joined, a row's segments are the corpus over and over from the row's start."""
    streams = Streams(documents, rows=rows, length=length)
    segments = [streams[n] for n in range(-(-3 * TOTAL // length))]
    for row in range(rows):
        own = np.concatenate([segment[row, :-1] for segment in segments])
        start = [row * TOTAL // rows]
        np.testing.assert_array_equal(own, (np.arange(len(own)) + start) % TOTAL)
    for segment, after in itertools.pairwise(segments):
        np.testing.assert_array_equal(segment[:, -1], after[:, 0])
        assert segment.shape == (rows, length + 1) and segment.dtype == np.int32


@pytest.mark.parametrize(("rows", "length"), [(1, 10), (3, 7), (5, 1)])
def test_the_rows_together_read_everything_in_a_pass(documents, rows, length):
    streams = Streams(documents, rows=rows, length=length)
    seen = [streams[n][:, :-1].ravel() for n in range(streams.segments_a_pass)]
    assert set(np.concatenate(seen).tolist()) == set(range(TOTAL))


def test_a_segment_depends_on_its_number_alone(documents):
    one, other = (Streams(documents, rows=3, length=8) for _ in range(2))
    forward = [one[n] for n in range(40)]
    for n in reversed(range(40)):
        np.testing.assert_array_equal(other[n], forward[n])
    far = 10**9  # a row's place is exact far behind 32 bits
    np.testing.assert_array_equal(other[far][0], (far * 8 + np.arange(9)) % TOTAL)


def test_the_iterator_goes_on_from_a_saved_position(documents):
    iterator = stream_segments(documents, rows=3, length=8)
    streams = Streams(documents, rows=3, length=8)
    for n in range(5):
        np.testing.assert_array_equal(next(iterator), streams[n])
    state = json.loads(json.dumps(iterator.get_state()))
    np.testing.assert_array_equal(next(iterator), streams[5])
    restored = stream_segments(documents, rows=3, length=8)
    restored.set_state(state)
    np.testing.assert_array_equal(next(restored), streams[5])


def test_a_corpus_of_bytes_has_separators_at_both_ends_of_a_document(tmp_path):
    texts = {"a.txt": b"first", "b.txt": b"second one", "c.txt": b"the third"}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    corpus = build(
        CorpusConfig(
            directory=str(tmp_path / "corpus"),
            sources=(str(tmp_path / "*.txt"),),
            heldout_fraction=0.3,
        )
    )
    documents = corpus.split("train")
    separator = corpus.tokenizer.separator
    segment = Streams(documents, rows=1, length=documents.tokens)[0][0]
    parts = [documents[i] for i in range(len(documents))]
    np.testing.assert_array_equal(segment[:-1], np.concatenate(parts))
    assert segment[0] == segment[-1] == separator
    assert (segment[:-1] == separator).sum() == 2 * len(documents)
    np.testing.assert_array_equal(
        documents.token_bytes[segment[:-1]].sum(), sum(len(part) - 2 for part in parts)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows=0 must be at least 1"),
        ({"length": -2}, "length=-2 must be at least 1"),
        ({"documents": []}, "nothing to predict in these 0 documents"),
        ({"documents": [np.zeros(1)]}, "nothing to predict in these 1 documents"),
    ],
)
def test_errors_say_what_to_do(documents, change, message):
    asked = {"documents": documents, "rows": 2, "length": 4} | change
    if isinstance(asked["documents"], list):
        asked["documents"] = ArrayDocuments(asked["documents"], np.ones(1))
    source = asked.pop("documents")
    with pytest.raises(ValueError, match=message):
        Streams(source, **asked)
