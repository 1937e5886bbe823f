"""Tasks by which papers tell sequence models apart, as endless random-access data.

Sample i of a task is a pure function of (seed, split, i), so batches can be resumed and
shared between processes as in `jaxlab.data.loader`, and test samples never come from
the stream of training samples. Every row has `length` positions; `weights` is 1 exactly
where an answer is asked for, and the target there is what the model should output at
that position (not the next input).
"""

import dataclasses
import functools
import itertools
import sys
from typing import Any, Protocol

import grain
import numpy as np
from jaxtyping import Int

from jaxlab.data.loader import batches

Sample = dict[str, Any]


class Task(Protocol):
    """A task: `sample` gives inputs, targets (int32) and weights (float32), [length].

    Any other entries, such as the depth of a needle, are stacked into the batch too.
    """

    @property
    def vocab_size(self) -> int: ...

    def sample(self, rng: np.random.Generator) -> Sample: ...


def task_batches(
    task: Task,
    *,
    batch_size: int,
    seed: int,
    split: str = "train",
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Return an endless iterator over batches of a task, like `packed_batches`.

    Args:
        task: any of the tasks below.
        batch_size: rows of the global batch; each process gets its share.
        seed: determines the samples.
        split: "train" or "test", which have separate random streams.
        process_index, process_count: select the share.

    Returns:
        A grain iterator of dicts of inputs, targets, weights and segment_ids (all 0),
        each [batch_size / process_count, length].
    """
    if split not in ("train", "test"):
        raise ValueError(f"There is no split {split!r}; a task has train and test.")
    return batches(
        _TaskRows(task, seed, split),
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
    )


@dataclasses.dataclass(frozen=True)
class _TaskRows:
    task: Task
    seed: int
    split: str

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Sample:
        stream = ("train", "test").index(self.split)
        words = np.random.SeedSequence(self.seed, spawn_key=(stream, index))
        sample = self.task.sample(np.random.Generator(np.random.Philox(words)))
        return sample | {"segment_ids": np.zeros(len(sample["inputs"]), np.int32)}


def _empty(length: int, fill: int = 0) -> Sample:
    return {
        "inputs": np.full(length, fill, np.int32),
        "targets": np.zeros(length, np.int32),
        "weights": np.zeros(length, np.float32),
    }


def _check(rule: bool, task: Any, message: str) -> None:
    if not rule:
        raise ValueError(f"{task} is impossible: {message}")


# State tracking -----------------------------------------------------------------------


@functools.cache
def group_table(group: str) -> Int[np.ndarray, "order order"]:
    """Return the multiplication table of a group: table[a, b] is a, then b.

    Elements are numbered in the lexicographic order of their permutations, so 0 is the
    identity; (a b)(i) = b(a(i)). In Z<n> element i is the rotation by i.

    Args:
        group: "S<n>" (all permutations), "A<n>" (the even ones), "Z<n>" (rotations) or
            "parity", which is "Z2"; n up to 5 for S and A.
    """
    kind, digits = ("Z", "2") if group == "parity" else (group[:1], group[1:])
    n = int(digits) if digits.isascii() and digits.isdigit() else 0
    if kind not in ("S", "A", "Z") or n < 1 or (kind != "Z" and n > 5):
        raise ValueError(
            f"There is no group {group!r}; choose S<n> or A<n> with n from 1 to 5, "
            "Z<n>, or parity."
        )
    if kind == "Z":
        a = np.arange(n, dtype=np.int32)
        return (a[:, None] + a[None, :]) % n
    elements = list(itertools.permutations(range(n)))
    if kind == "A":
        pairs = list(itertools.combinations(range(n), 2))
        elements = [p for p in elements if sum(p[i] > p[j] for i, j in pairs) % 2 == 0]
    number = {p: i for i, p in enumerate(elements)}
    products = [[number[tuple(b[i] for i in a)] for b in elements] for a in elements]
    return np.array(products, np.int32)


@dataclasses.dataclass(frozen=True)
class GroupWordProblem:
    """The running product of random group elements, y_t = x_1 x_2 ... x_t.

    Position 0 holds the beginning token, whose id is the order of the group. Every
    later position holds an element, drawn uniformly from the group, and asks for the
    product so far, taken from left to right as in `group_table`.

    Attributes:
        group: "S3", "S4", "A5", "S5", "Z<n>", "parity", ...; see `group_table`.
        length: positions a row, the beginning token included.

    Reference: Merrill, Petty & Sabharwal 2024, The Illusion of State in State-Space
        Models; Liu et al. 2023, Transformers Learn Shortcuts to Automata.
    """

    group: str = "S3"
    length: int = 128

    def __post_init__(self):
        group_table(self.group)
        _check(self.length >= 2, self, "length must be at least 2.")

    @property
    def vocab_size(self) -> int:
        return len(group_table(self.group)) + 1

    def sample(self, rng: np.random.Generator) -> Sample:
        table = group_table(self.group)
        elements = rng.integers(len(table), size=self.length - 1, dtype=np.int32)
        # Doubling scan: after a round with shift s, entry t is the product of the last
        # 2s elements up to t.
        product, shift = elements.copy(), 1
        while shift < len(product):
            product[shift:] = table[product[:-shift], product[shift:]]
            shift *= 2
        sample = _empty(self.length, fill=len(table))
        sample["inputs"][1:] = elements
        sample["targets"][1:] = product
        sample["weights"][1:] = 1
        return sample


# Recall and copying -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AssociativeRecall:
    """Multi-query associative recall (MQAR): after k v pairs, k again asks for v.

    A row opens with `num_pairs` different keys, each followed by its value. Then every
    key comes once more, g steps of two tokens into the rest of the row with probability
    proportional to g^(alpha-1), so most come early; its value is the target there. Keys
    are the ids 1..vocab_size/2 - 1, values the ids from vocab_size/2.

    Differs from the paper in: the rest of the row is filled with random keys that are
    not among its pairs, so that the value of a key is never ambiguous.

    Attributes:
        length: positions a row.
        vocab_size: ids of keys and values together.
        num_pairs: pairs, and queries, in a row.
        alpha: exponent of the power law (1 is uniform; the authors' code has 0.01).

    Reference: Arora et al. 2023, Zoology: Measuring and Improving Recall in Efficient
        Language Models, section 4 and appendix E.
    """

    length: int = 256
    vocab_size: int = 8192
    num_pairs: int = 16
    alpha: float = 0.01

    def __post_init__(self):
        _check(self.num_pairs >= 1, self, "num_pairs must be at least 1.")
        _check(self.alpha > 0, self, "alpha must be positive.")
        _check(
            4 * self.num_pairs <= self.length,
            self,
            f"{self.num_pairs} pairs and as many queries, of two tokens each, need "
            f"length >= {4 * self.num_pairs}.",
        )
        _check(
            self.vocab_size // 2 - 1 > self.num_pairs,
            self,
            f"{self.num_pairs} keys and at least one filler need vocab_size >= "
            f"{2 * self.num_pairs + 4}.",
        )

    def sample(self, rng: np.random.Generator) -> Sample:
        half, context = self.vocab_size // 2, 2 * self.num_pairs
        shuffled = rng.permutation(np.arange(1, half, dtype=np.int32))
        keys, others = np.split(shuffled, [self.num_pairs])
        values = half + rng.choice(self.vocab_size - half, self.num_pairs, False)

        steps = (self.length - context) // 2
        chance = np.arange(1, steps + 1) ** (self.alpha - 1)
        gaps = rng.choice(steps, self.num_pairs, replace=False, p=chance / chance.sum())
        queries = context + 2 * gaps

        sample = _empty(self.length)
        sample["inputs"][0:context:2] = keys
        sample["inputs"][1:context:2] = values
        sample["inputs"][context:] = rng.choice(others, self.length - context)
        sample["inputs"][queries] = keys
        sample["targets"][queries] = values
        sample["weights"][queries] = 1
        return sample


@dataclasses.dataclass(frozen=True)
class SelectiveCopying:
    """Copy the data tokens that are scattered among blanks, in their order.

    The row ends with `num_tokens` markers; the m-th asks for the m-th data token. Ids:
    0 blank, 1..num_symbols data, num_symbols + 1 marker.

    Attributes:
        length: positions a row, the markers included.
        num_tokens: data tokens in a row.
        num_symbols: kinds of data tokens.

    Reference: Gu & Dao 2023, Mamba, section 4.1.1; Jing et al. 2019, Gated Orthogonal
        Recurrent Units.
    """

    length: int = 256
    num_tokens: int = 16
    num_symbols: int = 16

    def __post_init__(self):
        _check(self.num_tokens >= 1, self, "num_tokens must be at least 1.")
        _check(self.num_symbols >= 2, self, "num_symbols must be at least 2.")
        _check(
            2 * self.num_tokens <= self.length,
            self,
            f"{self.num_tokens} data tokens and as many markers need length >= "
            f"{2 * self.num_tokens}.",
        )

    @property
    def vocab_size(self) -> int:
        return self.num_symbols + 2

    def sample(self, rng: np.random.Generator) -> Sample:
        context = self.length - self.num_tokens
        places = np.sort(rng.choice(context, self.num_tokens, replace=False))
        data = rng.integers(1, self.num_symbols + 1, self.num_tokens, dtype=np.int32)
        sample = _empty(self.length)
        sample["inputs"][places] = data
        sample["inputs"][context:] = self.num_symbols + 1
        sample["targets"][context:] = data
        sample["weights"][context:] = 1
        return sample


@dataclasses.dataclass(frozen=True)
class InductionHeads:
    """Recall the token that followed the only earlier occurrence of a special token.

    The special token (id num_symbols) is at a random position in a row of random
    symbols, and again at its end, which asks for the symbol after the first occurrence.

    Attributes:
        length: positions a row.
        num_symbols: kinds of symbols.

    Reference: Gu & Dao 2023, Mamba, section 4.1.2; Olsson et al. 2022, In-context
        Learning and Induction Heads.
    """

    length: int = 256
    num_symbols: int = 16

    def __post_init__(self):
        _check(self.length >= 3, self, "length must be at least 3.")
        _check(self.num_symbols >= 2, self, "num_symbols must be at least 2.")

    @property
    def vocab_size(self) -> int:
        return self.num_symbols + 1

    def sample(self, rng: np.random.Generator) -> Sample:
        sample = _empty(self.length)
        inputs = rng.integers(self.num_symbols, size=self.length, dtype=np.int32)
        place = rng.integers(self.length - 2)
        inputs[[place, -1]] = self.num_symbols
        sample["inputs"] = inputs
        sample["targets"][-1] = inputs[place + 1]
        sample["weights"][-1] = 1
        return sample


@dataclasses.dataclass(frozen=True)
class NeedleInHaystack:
    """Recall the value of a key, hidden at a random depth in filler.

    filler ... [needle] key v_1 .. v_n filler ... [query] key v_1 .. v_{n-1}, where the
    target at the last key is v_1, at v_1 is v_2, and so on. Ids: filler first, then
    keys, then values, then the markers [needle] and [query].

    A sample also holds `depth`, float32: the place of the needle from 0 (the first) to
    1 (the last where it fits), to report recall by depth.

    Attributes:
        length: positions a row.
        value_length: n, the tokens of the value.
        num_filler, num_keys, num_values: kinds of tokens of each sort.

    Reference: Kamradt 2023, Needle In A Haystack; Hsieh et al. 2024, RULER, section 3.
    """

    length: int = 256
    value_length: int = 4
    num_filler: int = 64
    num_keys: int = 16
    num_values: int = 16

    def __post_init__(self):
        for name in ("value_length", "num_filler", "num_keys", "num_values"):
            _check(getattr(self, name) >= 1, self, f"{name} must be at least 1.")
        shortest = 2 * self.value_length + 3  # the needle, n + 2, and the query, n + 1
        _check(
            self.length >= shortest,
            self,
            f"the needle and the query alone need length >= {shortest}.",
        )

    @property
    def vocab_size(self) -> int:
        return self.num_filler + self.num_keys + self.num_values + 2

    def sample(self, rng: np.random.Generator) -> Sample:
        n, keys, values = (
            self.value_length,
            self.num_filler,
            self.num_filler + self.num_keys,
        )
        needle_mark, query_mark = self.vocab_size - 2, self.vocab_size - 1
        key = rng.integers(keys, values)
        value = rng.integers(values, needle_mark, n)
        query = self.length - (n + 1)
        last_place = query - (n + 2)
        place = rng.integers(last_place + 1)

        sample = _empty(self.length)
        sample["inputs"][:] = rng.integers(self.num_filler, size=self.length)
        sample["inputs"][place : place + n + 2] = [needle_mark, key, *value]
        sample["inputs"][query:] = [query_mark, key, *value[:-1]]
        sample["targets"][-n:] = value
        sample["weights"][-n:] = 1
        return sample | {"depth": np.float32(place / max(last_place, 1))}
