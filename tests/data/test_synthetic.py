"""Synthetic tasks, each answer worked out again from the inputs alone."""

import itertools
import json

import numpy as np
import pytest

from jaxlab.data import (
    AssociativeRecall,
    GroupWordProblem,
    InductionHeads,
    NeedleInHaystack,
    SelectiveCopying,
    group_table,
    task_batches,
)

TASKS = [
    GroupWordProblem("S3", 17),
    AssociativeRecall(length=48, vocab_size=64, num_pairs=5),
    SelectiveCopying(length=20, num_tokens=4, num_symbols=5),
    InductionHeads(length=12, num_symbols=4),
    NeedleInHaystack(length=30, value_length=3),
]
name_of = lambda task: type(task).__name__  # noqa: E731


def take(task, count, **kwargs):
    iterator = task_batches(task, **{"batch_size": 8, "seed": 3} | kwargs)
    return [next(iterator) for _ in range(count)]


def rows(task, count=4, **kwargs):
    for batch in take(task, count, **kwargs):
        for row in range(len(batch["inputs"])):
            yield {key: value[row] for key, value in batch.items()}


@pytest.mark.parametrize("task", TASKS, ids=name_of)
def test_shapes_dtypes_ranges(task):
    for batch in take(task, 3):
        for key, dtype in {
            "inputs": np.int32,
            "targets": np.int32,
            "weights": np.float32,
            "segment_ids": np.int32,
        }.items():
            assert batch[key].shape == (8, task.length)
            assert batch[key].dtype == dtype
        assert batch["inputs"].min() >= 0 and batch["targets"].min() >= 0
        assert max(batch["inputs"].max(), batch["targets"].max()) < task.vocab_size
        assert not batch["segment_ids"].any()
        assert set(np.unique(batch["weights"])) <= {0.0, 1.0}
        assert (batch["weights"].sum(1) > 0).all()


@pytest.mark.parametrize("task", TASKS, ids=name_of)
def test_same_for_every_split_over_processes_and_after_restoring(task):
    whole = take(task, 4)
    for count in (2, 4):
        shares = [
            take(task, 4, process_index=p, process_count=count) for p in range(count)
        ]
        for step, batch in enumerate(whole):
            for key in batch:
                joined = np.concatenate([share[step][key] for share in shares])
                np.testing.assert_array_equal(joined, batch[key])
    iterator = task_batches(task, batch_size=8, seed=3)
    iterator.set_state(json.loads('{"next_index": 2}'))
    for batch in whole[2:]:
        restored = next(iterator)
        for key in batch:
            np.testing.assert_array_equal(restored[key], batch[key])


@pytest.mark.parametrize("task", TASKS, ids=name_of)
def test_seeds_and_splits_have_other_samples(task):
    seen = [
        row["inputs"].tobytes()
        for kwargs in ({}, {"split": "test"}, {"seed": 4}, {"seed": 4, "split": "test"})
        for row in rows(task, **kwargs)
    ]
    assert len(set(seen)) > 0.95 * len(seen)  # short rows may meet by chance


ORDERS = {"S3": 6, "S4": 24, "A4": 12, "A5": 60, "S5": 120, "Z7": 7, "parity": 2}


@pytest.mark.parametrize("group", ORDERS)
def test_group_axioms(group):
    table = group_table(group)
    n = ORDERS[group]
    assert table.shape == (n, n)
    every = np.arange(n)
    np.testing.assert_array_equal(table[0], every)  # identity
    np.testing.assert_array_equal(table[:, 0], every)
    for a in range(n):  # Latin square: inverses exist
        assert sorted(table[a]) == sorted(table[:, a]) == list(every)
        np.testing.assert_array_equal(table[table[a]], table[a][table])  # (ab)c = a(bc)
    commutes = (table == table.T).all()
    assert commutes == (group[0] == "Z" or group == "parity")


def test_a5_is_closed_under_s5():
    # The even permutations, found by another rule: products of 3-cycles.
    s5 = list(itertools.permutations(range(5)))
    even = [p for p in s5 if round(np.linalg.det(np.eye(5)[list(p)])) == 1]
    table, big = group_table("A5"), group_table("S5")
    index = [s5.index(p) for p in even]
    np.testing.assert_array_equal(np.array(index)[table], big[np.ix_(index, index)])


@pytest.mark.parametrize("group", ["S3", "S4", "S5"])
@pytest.mark.parametrize("length", [2, 3, 65])
def test_running_product_by_composing_permutations(group, length):
    n = int(group[1])
    elements = list(itertools.permutations(range(n)))
    for row in rows(GroupWordProblem(group, length)):
        assert row["inputs"][0] == len(elements)
        assert row["weights"].tolist() == [0.0] + [1.0] * (length - 1)
        state = list(range(n))
        for element, target in zip(row["inputs"][1:], row["targets"][1:], strict=True):
            # Carry every point through the element that comes next.
            state = [elements[element][point] for point in state]
            assert elements[target] == tuple(state)


def test_parity_and_every_element_equally_often():
    for row in rows(GroupWordProblem("parity", 40)):
        np.testing.assert_array_equal(
            row["targets"][1:], np.cumsum(row["inputs"][1:]) % 2
        )
    inputs = take(GroupWordProblem("A5", 101), 8)
    counts = np.bincount(np.concatenate([b["inputs"][:, 1:].ravel() for b in inputs]))
    assert len(counts) == 60
    # 6400 draws over 60 elements: 106.7 each, standard deviation 10.2.
    assert counts.min() > 106.7 - 5 * 10.2 and counts.max() < 106.7 + 5 * 10.2


def test_recall_answers_stand_in_the_input():
    task = AssociativeRecall(length=64, vocab_size=80, num_pairs=7)
    for row in rows(task):
        inputs, asked = row["inputs"].tolist(), np.flatnonzero(row["weights"])
        assert len(asked) == 7 and asked.min() >= 14
        memory = dict(zip(inputs[:14:2], inputs[1:14:2], strict=True))
        assert len(memory) == 7 == len(set(memory.values()))
        assert sorted(inputs[i] for i in asked) == sorted(memory)
        for i, token in enumerate(inputs):
            if i in asked:
                assert row["targets"][i] == memory[token]
            elif i >= 14:
                assert (
                    token not in memory and token < 40
                )  # a key that is not this row's


def test_recall_gaps_follow_the_power_law():
    def mean_gap(alpha):
        task = AssociativeRecall(length=256, vocab_size=64, num_pairs=2, alpha=alpha)
        return np.mean(
            [np.flatnonzero(r["weights"]) - 4 for r in rows(task, batch_size=64)]
        )

    # Uniform: half of 252, standard error about 3. At 0.1, p ~ gap^-0.9: the mean of
    # one draw is sum g^0.1 / sum g^-0.9, about 2 * 33 of 252.
    assert abs(mean_gap(1.0) - 125) < 12
    assert mean_gap(0.1) < 85


def test_recall_fills_the_row_exactly():
    task = AssociativeRecall(length=16, vocab_size=12, num_pairs=4)
    for row in rows(task):
        assert np.flatnonzero(row["weights"]).tolist() == [8, 10, 12, 14]


def test_copying_repeats_the_data_in_order():
    task = SelectiveCopying(length=30, num_tokens=6, num_symbols=9)
    places = set()
    for row in rows(task):
        context, end = row["inputs"][:24], row["inputs"][24:]
        assert (end == 10).all()
        assert row["targets"][24:].tolist() == [t for t in context if t != 0]
        assert row["weights"].tolist() == [0.0] * 24 + [1.0] * 6
        assert context.max() <= 9
        places |= set(np.flatnonzero(context))
    assert places == set(range(24))


def test_induction_recalls_what_followed():
    for row in rows(InductionHeads(length=10, num_symbols=5)):
        inputs = row["inputs"].tolist()
        assert inputs.count(5) == 2 and inputs[-1] == 5
        assert row["targets"][-1] == inputs[inputs.index(5) + 1] != 5
        assert row["weights"].tolist() == [0.0] * 9 + [1.0]


@pytest.mark.parametrize("n", [1, 3])
def test_needle_is_found_at_its_depth(n):
    task = NeedleInHaystack(length=24, value_length=n, num_filler=7)
    depths = []
    for row in rows(task, count=12):
        inputs = row["inputs"].tolist()
        needle, query = (
            inputs.index(task.vocab_size - 2),
            inputs.index(task.vocab_size - 1),
        )
        assert inputs[needle + 1] == inputs[query + 1]  # the key
        value = inputs[needle + 2 : needle + 2 + n]
        assert row["targets"][-n:].tolist() == value
        assert inputs[query + 2 :] == value[:-1] and query == 24 - n - 1
        assert row["weights"].tolist() == [0.0] * (24 - n) + [1.0] * n
        others = inputs[:needle] + inputs[needle + 2 + n : query]
        assert all(token < 7 for token in others)
        assert row["depth"] == np.float32(needle / (query - n - 2))
        depths.append(float(row["depth"]))
    assert min(depths) == 0.0 and max(depths) == 1.0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: GroupWordProblem("S6"), "no group 'S6'"),
        (lambda: GroupWordProblem("Q8"), "no group 'Q8'"),
        (lambda: GroupWordProblem("Z0"), "no group 'Z0'"),
        (lambda: GroupWordProblem("S3", 1), "length must be at least 2"),
        (lambda: AssociativeRecall(length=63, num_pairs=16), "length >= 64"),
        (lambda: AssociativeRecall(vocab_size=34, num_pairs=16), "vocab_size >= 36"),
        (lambda: AssociativeRecall(alpha=0.0), "alpha must be positive"),
        (lambda: SelectiveCopying(length=31, num_tokens=16), "length >= 32"),
        (lambda: InductionHeads(length=2), "length must be at least 3"),
        (lambda: NeedleInHaystack(length=10, value_length=4), "length >= 11"),
        (lambda: task_batches(TASKS[0], batch_size=2, seed=0, split="dev"), "'dev'"),
        (
            lambda: task_batches(TASKS[0], batch_size=3, seed=0, process_count=2),
            "does not divide",
        ),
    ],
)
def test_impossible_tasks_say_why(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_smallest_tasks_work():
    for task in (
        GroupWordProblem("Z1", 2),
        AssociativeRecall(length=4, vocab_size=6, num_pairs=1),
        SelectiveCopying(length=2, num_tokens=1, num_symbols=2),
        InductionHeads(length=3, num_symbols=2),
        NeedleInHaystack(length=11, value_length=4),
    ):
        assert all(row["weights"].any() for row in rows(task, 1))
