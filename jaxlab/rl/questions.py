"""Questions with one right answer, for small models of Python source read as bytes.

Question i of a task is a pure function of (seed, split, i), so any batch of a run can
be made again. A question is held out by a hash of its prompt, not by where it is drawn:
nothing that is trained on is ever asked in the test.

Dimension key: Q questions, P tokens of the longest prompt, A of the longest answer.
"""

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from jaxlab.data import ByteTokenizer

HELD_OUT = 8  # one question in so many
ATTEMPTS = 1000  # draws before a split counts as empty


@struct.dataclass
class Questions:
    """Prompts, right-aligned, and what should follow them.

    Attributes:
        prompts: int32 ``[Q, P]``, padded on the left.
        segment_ids: int32 ``[Q, P]``, 0, and -1 for padding.
        answers: int32 ``[Q, A]``, padded on the right.
        answer_mask: float32 ``[Q, A]``, 1 for the tokens of an answer.
    """

    prompts: Int[Array, "Q P"]
    segment_ids: Int[Array, "Q P"]
    answers: Int[Array, "Q A"]
    answer_mask: Float[Array, "Q A"]

    def repeat(self, times: int) -> "Questions":
        """Each question so many times, one behind the other."""
        return jax.tree.map(lambda a: jnp.repeat(a, times, axis=0), self)


class Task(Protocol):
    """`sample` gives a prompt and its answer, neither longer than `longest`."""

    @property
    def longest(self) -> tuple[str, str]: ...

    def sample(self, rng: np.random.Generator) -> tuple[str, str]: ...


def ask(
    task: Task, seed: int, numbers: Iterable[int], split: str = "train"
) -> Questions:
    """The questions `numbers` of a task, as bytes behind the separator.

    Args:
        task: one of the tasks below.
        seed: of the questions.
        numbers: at least 0; two numbers may give the same question.
        split: "train" or "test", which share no question.

    Returns:
        `Questions`, whose P and A depend on the task alone.

    Raises:
        ValueError: no such split, or the task has no question in it.
    """
    if split not in ("train", "test"):
        raise ValueError(f"There is no split {split!r}; a task has train and test.")
    tokenizer = ByteTokenizer()
    drawn = [_draw(task, seed, number, split) for number in numbers]
    longest_prompt, longest_answer = map(tokenizer.encode, task.longest)
    P, A = 1 + len(longest_prompt), len(longest_answer)
    prompts, segment_ids = np.zeros((2, len(drawn), P), np.int32)
    answers, answer_mask = np.zeros((2, len(drawn), A), np.int32)
    for row, (prompt, answer) in enumerate(drawn):
        prompt = [tokenizer.separator, *tokenizer.encode(prompt)]
        answer = tokenizer.encode(answer)
        prompts[row, P - len(prompt) :] = prompt
        segment_ids[row, : P - len(prompt)] = -1
        answers[row, : len(answer)] = answer
        answer_mask[row, : len(answer)] = 1
    arrays = prompts, segment_ids, answers, answer_mask.astype(np.float32)
    return Questions(*map(jnp.asarray, arrays))


def held_out(prompt: str) -> bool:
    """Whether a question belongs to the test.

    Prompts of the same characters share a split: 3 + 4 does not give 4 + 3 away.
    """
    characters = "".join(sorted(prompt)).encode()
    return hashlib.sha256(characters).digest()[0] % HELD_OUT == 0


def _draw(task: Task, seed: int, number: int, split: str) -> tuple[str, str]:
    stream = ("train", "test").index(split)
    words = np.random.SeedSequence(seed, spawn_key=(stream, number))
    rng = np.random.Generator(np.random.Philox(words))
    for _ in range(ATTEMPTS):
        prompt, answer = task.sample(rng)
        if held_out(prompt) == (split == "test"):
            return prompt, answer
    raise ValueError(
        f"None of {ATTEMPTS} questions of {task} is in the split {split!r}, which has "
        f"one in {HELD_OUT} (test) or the others (train); make the task larger."
    )


def _check(rule: bool, task: Any, message: str) -> None:
    if not rule:
        raise ValueError(f"{task} is impossible: {message}")


@dataclasses.dataclass(frozen=True)
class Sums:
    """Two numbers and their sum as a tuple: "(3, 4, ", answer "7)".

    Python source mostly has a number there, so that a small model of it is right now
    and then. Answers are drawn evenly, and then first operands, so that no answer is a
    good guess; `ask` then leaves out the questions of the other split, which are not
    spread evenly over answers: of one digit, 12 of 55 are held out, with the sums 6 to
    9.

    Attributes:
        largest: operand; the smallest is 0.
        digits: of the answer; None for any number of them.
        end: that the answer has to have; "" where it may go on.
    """

    largest: int = 9
    digits: int | None = None
    end: str = ")"

    def __post_init__(self):
        _check(self.largest >= 1, self, "largest must be at least 1.")
        if self.digits is not None:
            _check(self.digits >= 1, self, "digits must be at least 1, or None.")
            _check(
                self.range[0] <= 2 * self.largest,
                self,
                f"no two operands add up to {self.range[0]}.",
            )

    @property
    def range(self) -> tuple[int, int]:
        """The smallest and the largest answer that is asked for."""
        if self.digits is None:
            return 0, 2 * self.largest
        smallest = 0 if self.digits == 1 else 10 ** (self.digits - 1)
        return smallest, min(10**self.digits - 1, 2 * self.largest)

    @property
    def longest(self) -> tuple[str, str]:
        return self._question(self.largest, self.largest)[
            0
        ], f"{self.range[1]}{self.end}"

    def sample(self, rng: np.random.Generator) -> tuple[str, str]:
        low, high = self.range
        answer = int(rng.integers(low, high + 1))
        smallest, greatest = max(answer - self.largest, 0), min(self.largest, answer)
        first = int(rng.integers(smallest, greatest + 1))
        return self._question(first, answer - first)

    def _question(self, first: int, second: int) -> tuple[str, str]:
        return f"({first}, {second}, ", f"{first + second}{self.end}"


@dataclasses.dataclass(frozen=True)
class Copy:
    r"""An argument kept under its own name: "        self.abc = ", answer "abc\n".

    Attributes:
        length: letters of a random name.
        names: to choose from in place of random ones.
    """

    length: int = 3
    names: tuple[str, ...] | None = None

    def __post_init__(self):
        _check(self.length >= 1, self, "length must be at least 1.")
        if self.names is not None:
            _check(len(self.names) > 0, self, "names is empty; None takes random ones.")
            _check(
                all(name.isidentifier() for name in self.names),
                self,
                "every name must be one that Python could have.",
            )

    @property
    def longest(self) -> tuple[str, str]:
        name = max(self.names or ["x" * self.length], key=lambda n: len(n.encode()))
        return self._question(name)

    def sample(self, rng: np.random.Generator) -> tuple[str, str]:
        if self.names is not None:
            return self._question(self.names[rng.integers(len(self.names))])
        letters = rng.integers(ord("a"), ord("z") + 1, self.length)
        return self._question(bytes(letters.tolist()).decode())

    def _question(self, name: str) -> tuple[str, str]:
        return f"        self.{name} = ", f"{name}\n"
