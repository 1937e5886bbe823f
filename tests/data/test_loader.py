"""The loader: nothing lost, nothing twice, and the same after every restore."""

import collections
import itertools
import json
import time

import numpy as np
import pytest

from jaxlab.data import (
    ArrayDocuments,
    CorpusConfig,
    build,
    heldout_batches,
    packed_batches,
)

KEYS = {
    "inputs": np.int32,
    "targets": np.int32,
    "weights": np.float32,
    "segment_ids": np.int32,
    "bytes": np.float32,
}
LENGTHS = [1, 2, 3, 29, 8, 7, 1, 1, 64, 5, 16, 17, 2]


@pytest.fixture
def documents():
    """Documents in which no token occurs twice, so that a pair tells where it is from.

    Token i stands for i % 4 bytes.
    """
    ends = np.cumsum(LENGTHS)
    arrays = [np.arange(end - n, end) for end, n in zip(ends, LENGTHS, strict=True)]
    return ArrayDocuments(arrays, np.arange(ends[-1]) % 4)


def inside(documents):
    """Every pair of neighbours inside a document."""
    return [
        pair
        for i in range(len(documents))
        for pair in itertools.pairwise(documents[i].tolist())
    ]


def pairs_of(batch):
    """The (input, target) pairs of a batch that count."""
    counts = batch["weights"] > 0
    return list(
        zip(
            batch["inputs"][counts].tolist(),
            batch["targets"][counts].tolist(),
            strict=True,
        )
    )


def equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.parametrize("length", [1, 3, 16, 1000])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_one_epoch_has_every_pair_once(documents, length, batch_size):
    batches = list(
        packed_batches(
            documents,
            batch_size=batch_size,
            sequence_length=length,
            seed=0,
            num_epochs=1,
        )
    )
    for batch in batches:
        for key, dtype in KEYS.items():
            assert batch[key].shape == (batch_size, length)
            assert batch[key].dtype == dtype
    found = [pair for batch in batches for pair in pairs_of(batch)]
    assert sorted(found) == sorted(inside(documents))
    # Chaining the pairs gives back every document of two tokens and more.
    following = dict(found)
    for i in range(len(documents)):
        document = documents[i].tolist()
        rebuilt = [document[0]]
        while rebuilt[-1] in following:
            rebuilt.append(following[rebuilt[-1]])
        assert rebuilt == document
    rows = -(-(sum(LENGTHS) - 1) // length)
    assert len(batches) == -(-rows // batch_size)


def test_rows_are_what_they_say(documents):
    """Each key of each row, from the tokens alone."""
    owner = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    batches = packed_batches(
        documents, batch_size=2, sequence_length=10, seed=5, num_epochs=2
    )
    padded = 0
    for batch in batches:
        for row in zip(*(batch[key] for key in KEYS), strict=True):
            inputs, targets, weights, segments, nbytes = row
            real = segments >= 0
            padded += (~real).sum()
            assert (np.diff(real.astype(int)) <= 0).all()  # padding comes last
            for key in (inputs, targets, weights, nbytes):
                assert not key[~real].any()
            inputs, targets = inputs[real], targets[real]
            np.testing.assert_array_equal(inputs[1:], targets[:-1])
            same = owner[inputs] == owner[targets]
            np.testing.assert_array_equal(weights[real], same)
            np.testing.assert_array_equal(nbytes[real], targets % 4)
            # Documents are numbered as they come in the row.
            numbers = {d: i for i, d in enumerate(dict.fromkeys(owner[inputs]))}
            assert segments[real].tolist() == [numbers[d] for d in owner[inputs]]
    assert padded > 0


def test_orders_change_with_epoch_and_seed(documents):
    def borders(seed, epochs):
        """The pairs of documents that meet, and the rows in order, by epoch."""
        per_epoch = -(-(sum(LENGTHS) - 1) // 16)
        iterator = packed_batches(
            documents, batch_size=1, sequence_length=16, seed=seed, num_epochs=epochs
        )
        rows = [batch for batch in iterator]
        assert len(rows) == epochs * per_epoch
        return [
            tuple(tuple(r["inputs"][0].tolist()) for r in rows[i : i + per_epoch])
            for i in range(0, len(rows), per_epoch)
        ]

    epochs = borders(0, 3) + borders(1, 3)
    assert len(set(epochs)) == 6
    assert borders(0, 3) == borders(0, 3)
    # Not only the rows: the documents next to each other change too.
    assert len({frozenset(epoch) for epoch in epochs}) == 6


def test_epochs_follow_each_other_without_a_gap(documents):
    """Batches that straddle two epochs, and each epoch complete."""
    pairs = collections.Counter()
    batches = packed_batches(
        documents, batch_size=4, sequence_length=7, seed=2, num_epochs=5
    )
    rows_per_epoch = -(-(sum(LENGTHS) - 1) // 7)
    assert rows_per_epoch % 4  # so that they do straddle
    rows = [
        {key: value[i : i + 1] for key, value in batch.items()}
        for batch in batches
        for i in range(4)
    ]
    for epoch in range(5):
        part = rows[epoch * rows_per_epoch : (epoch + 1) * rows_per_epoch]
        found = [pair for row in part for pair in pairs_of(row)]
        assert sorted(found) == sorted(inside(documents))
        pairs.update(found)
    assert set(pairs.values()) == {5}
    assert all((row["segment_ids"] == -1).all() for row in rows[5 * rows_per_epoch :])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_share_the_global_batch(documents, count):
    kwargs = {"batch_size": 4, "sequence_length": 6, "seed": 1, "num_epochs": 2}
    whole = list(packed_batches(documents, **kwargs))
    shares = [
        list(packed_batches(documents, **kwargs, process_index=p, process_count=count))
        for p in range(count)
    ]
    assert all(len(share) == len(whole) for share in shares)
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        assert all(len(part["inputs"]) == 4 // count for part in parts)
        equal({k: np.concatenate([part[k] for part in parts]) for k in batch}, batch)
    held = {"batch_size": 4, "sequence_length": 6}
    found = [
        pair
        for p in range(count)
        for batch in heldout_batches(
            documents, **held, process_index=p, process_count=count
        )
        for pair in pairs_of(batch)
    ]
    assert sorted(found) == sorted(inside(documents))


def test_restoring_anywhere_gives_the_same_future(documents):
    kwargs = {"batch_size": 3, "sequence_length": 5, "seed": 7}
    iterator = packed_batches(documents, **kwargs)
    states, batches = [], []
    for step in range(60):  # several epochs of 11 steps
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
        if step % 7 == 0:
            time.sleep(0.01)  # let it read ahead
    for step in (0, 1, 2, 9, 10, 11, 12, 31, 57):
        fresh = packed_batches(documents, **kwargs)
        fresh.set_state(json.loads(states[step]))
        for expected in batches[step : step + 3]:
            equal(next(fresh), expected)
    # The same iterator may go back and forth, also in the middle of reading ahead.
    for step in (40, 3, 44, 43, 0):
        iterator.set_state(json.loads(states[step]))
        assert json.dumps(iterator.get_state()) == states[step]
        equal(next(iterator), batches[step])
        assert json.dumps(iterator.get_state()) == states[step + 1]


def test_a_state_may_be_restored_on_another_number_of_processes(documents):
    kwargs = {"batch_size": 4, "sequence_length": 5, "seed": 7}
    two = packed_batches(documents, **kwargs, process_index=1, process_count=2)
    for _ in range(13):
        next(two)
    expected = next(itertools.islice(packed_batches(documents, **kwargs), 13, None))
    for p in range(4):
        four = packed_batches(documents, **kwargs, process_index=p, process_count=4)
        four.set_state(two.get_state())
        equal(next(four), {key: value[p : p + 1] for key, value in expected.items()})


def test_the_end_can_be_restored(documents):
    kwargs = {"batch_size": 8, "sequence_length": 9, "seed": 7, "num_epochs": 1}
    iterator = packed_batches(documents, **kwargs)
    steps = len(list(iterator))
    fresh = packed_batches(documents, **kwargs)
    fresh.set_state(iterator.get_state())
    assert list(fresh) == []
    fresh.set_state({"next_index": steps - 1})
    assert len(list(fresh)) == 1


@pytest.mark.parametrize("length, batch_size", [(1, 7), (10, 4), (500, 2)])
def test_heldout_has_every_target_once_in_order(documents, length, batch_size):
    batches = list(
        heldout_batches(documents, batch_size=batch_size, sequence_length=length)
    )
    found = [pair for batch in batches for pair in pairs_of(batch)]
    assert found == inside(documents)
    stream = np.concatenate([b["inputs"][b["segment_ids"] >= 0] for b in batches])
    np.testing.assert_array_equal(stream, np.arange(sum(LENGTHS) - 1))
    assert all(batch["inputs"].shape == (batch_size, length) for batch in batches)


@pytest.mark.parametrize("max_tokens", [1, 9, 10, 11, 39, 154, 155, 10**6])
def test_heldout_takes_max_tokens_from_all_over(documents, max_tokens):
    def rows(max_tokens):
        batches = heldout_batches(
            documents, batch_size=1, sequence_length=10, max_tokens=max_tokens
        )
        return [batch["inputs"][0] for batch in batches]

    everything, some = rows(None), rows(max_tokens)
    assert len(some) == min(max(1, max_tokens // 10), len(everything))
    # Each is the row at the start of one of len(some) equal parts.
    for i, row in enumerate(some):
        expected = everything[i * len(everything) // len(some)]
        np.testing.assert_array_equal(row, expected)


def test_a_corpus_on_disk(tmp_path):
    """Documents written to disk come back through the batches, byte for byte."""
    root = tmp_path / "in"
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(30):
        text = f"{i:02d}" + "".join(rng.choice(list("abcdefé\n"), 20 * i))
        (root / f"{i}.txt").write_text(text)
    corpus = build(
        CorpusConfig(
            directory=str(tmp_path / "corpus"),
            sources=(str(root),),
            heldout_fraction=0.3,
        )
    )
    heldout = corpus.split("heldout")
    batches = list(heldout_batches(heldout, batch_size=3, sequence_length=50))
    # Bits per byte divide by exactly the bytes of the files.
    assert sum((b["weights"] * b["bytes"]).sum() for b in batches) == heldout.bytes
    targets = np.concatenate([b["targets"][b["segment_ids"] >= 0] for b in batches])
    stream = np.concatenate([heldout[i] for i in range(len(heldout))])
    np.testing.assert_array_equal(targets, stream[1:])

    train = corpus.split("train")
    in_memory = ArrayDocuments(
        [train[i] for i in range(len(train))], corpus.tokenizer.token_bytes
    )
    kwargs = {"batch_size": 4, "sequence_length": 33, "seed": 3, "num_epochs": 2}
    from_disk = list(packed_batches(train, **kwargs))
    for a, b in zip(from_disk, packed_batches(in_memory, **kwargs), strict=True):
        equal(a, b)
    assert sum((b["weights"] * b["bytes"]).sum() for b in from_disk) == 2 * train.bytes


def test_a_damaged_shard_is_reported_through_the_loader(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"text {i} " * 100)
    cfg = CorpusConfig(
        directory=str(tmp_path / "corpus"), sources=(str(tmp_path / "*.txt"),)
    )
    train = build(cfg).split("train")
    shard = tmp_path / "corpus" / "train" / "tokens" / "c" / "0"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match="does not match its checksum"):
        next(packed_batches(train, batch_size=1, sequence_length=8, seed=0))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 6, "process_count": 4}, "batch_size=6 .* does not divide"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"num_epochs": 0}, "num_epochs=0"),
        ({"process_index": 2, "process_count": 2}, r"process_index=2 is not in 0\.\.1"),
        ({"process_index": -1}, "process_index=-1"),
    ],
)
def test_bad_arguments(documents, change, message):
    kwargs = {"batch_size": 4, "sequence_length": 8, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        packed_batches(documents, **kwargs)


def test_nothing_to_predict():
    for arrays in ([], [[3]]):
        documents = ArrayDocuments(arrays, np.ones(5))
        with pytest.raises(ValueError, match="nothing to predict"):
            heldout_batches(documents, batch_size=1, sequence_length=4)
    documents = ArrayDocuments([[3, 1]], np.ones(5))
    with pytest.raises(ValueError, match="max_tokens=0"):
        heldout_batches(documents, batch_size=1, sequence_length=4, max_tokens=0)
