"""Questions: what is asked, where it stands in the arrays, and what is held out."""

import ast
import math

import numpy as np
import pytest

from jaxlab.data import ByteTokenizer
from jaxlab.rl.questions import Copy, Sums, ask, held_out

TASKS = (Sums(), Sums(largest=120), Sums(digits=1), Copy(), Copy(names=("abc", "x_1")))


def texts(questions):
    """Prompts without their padding, and answers, read back from the arrays."""
    decode = ByteTokenizer().decode
    rows = zip(*map(np.asarray, vars(questions).values()), strict=True)
    return [
        (decode(prompt[ids >= 0]), decode(answer[mask > 0]))
        for prompt, ids, answer, mask in rows
    ]


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_prompts_end_and_answers_begin_at_the_same_place(task):
    questions = ask(task, 3, range(40))
    prompts, ids, answers, mask = map(np.asarray, vars(questions).values())
    assert prompts.dtype == ids.dtype == answers.dtype == np.int32
    assert mask.dtype == np.float32 and prompts.shape == ids.shape
    longest_prompt, longest_answer = task.longest
    assert prompts.shape == (40, 1 + len(longest_prompt))
    assert answers.shape == mask.shape == (40, len(longest_answer))
    for row in range(40):
        length = int((ids[row] >= 0).sum())
        np.testing.assert_array_equal(ids[row, -length:], 0)
        assert prompts[row, -length] == ByteTokenizer.separator
        assert not prompts[row, :-length].any()
        size = int(mask[row].sum())
        np.testing.assert_array_equal(mask[row], np.arange(mask.shape[1]) < size)
        assert answers[row, size - 1] in b"\n)" and not answers[row, size:].any()


def test_sums_are_right():
    for task, fits in (
        (Sums(largest=120), lambda total: True),
        (Sums(largest=120, digits=2), lambda total: 10 <= total <= 99),
        (Sums(largest=50, digits=3), lambda total: total == 100),
        (Sums(digits=1, end=""), lambda total: total <= 9),
    ):
        asked = [task.sample(np.random.default_rng(seed)) for seed in range(1500)]
        for prompt, answer in asked:
            whole = prompt + answer + (")" if task.end == "" else "")
            left, right, total = ast.literal_eval(whole)
            assert 0 <= left <= task.largest and 0 <= right <= task.largest
            assert total == left + right and fits(total)
            assert answer == f"{total}{task.end}"
    assert {prompt for prompt, _ in asked} == {
        prompt_of(a, b) for a in range(10) for b in range(10 - a)
    }


def test_no_answer_is_a_good_guess():
    rng = np.random.default_rng(0)
    drawn = [int(Sums(digits=1, end="").sample(rng)[1]) for _ in range(4000)]
    assert np.abs(np.bincount(drawn) - 400).max() < 5 * math.sqrt(400 * 0.9)


def test_which_sums_of_one_digit_are_held_out():
    pairs = [(a, b) for a in range(10) for b in range(10 - a)]
    sums = [a + b for a, b in pairs if held_out(prompt_of(a, b))]
    assert len(pairs) == 55 and len(sums) == 12 and set(sums) == {6, 7, 8, 9}


def prompt_of(a, b):
    return f"({a}, {b}, "


def test_a_copy_asks_for_the_name():
    for name in ("abc", "x_1"):
        assert ("        self." + name + " = ", name + "\n") in {
            Copy(names=("abc", "x_1")).sample(np.random.default_rng(seed))
            for seed in range(20)
        }
    prompt, answer = Copy(length=5).sample(np.random.default_rng(0))
    assert prompt == f"        self.{answer[:-1]} = " and len(answer) == 6
    assert answer[:-1].isalpha() and answer[:-1].islower()


def test_a_question_is_a_function_of_seed_split_and_number():
    asked = texts(ask(Copy(), 1, range(20)))
    assert asked == [texts(ask(Copy(), 1, [number]))[0] for number in range(20)]
    assert len(set(asked)) == 20
    for other in (ask(Copy(), 2, range(20)), ask(Copy(), 1, range(20), "test")):
        assert not set(asked) & set(texts(other))


def test_no_question_is_in_both_splits():
    """Nor the other order of a sum; and together they are the whole task."""
    splits = [
        {prompt for prompt, _ in texts(ask(Sums(), 0, range(1500), split))}
        for split in ("train", "test")
    ]
    assert not splits[0] & splits[1] and len(splits[0] | splits[1]) == 100
    assert len(splits[1]) == 14
    for a in range(10):
        for b in range(10):
            assert held_out(prompt_of(a, b)) == held_out(prompt_of(b, a))


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: Sums(largest=0), "largest must be at least 1"),
        (lambda: Sums(digits=0), "digits must be at least 1, or None"),
        (lambda: Sums(digits=3), "no two operands add up to 100"),
        (lambda: Copy(length=0), "length must be at least 1"),
        (lambda: Copy(names=()), "names is empty"),
        (lambda: Copy(names=("a b",)), "one that Python could have"),
        (lambda: ask(Sums(), 0, [0], "dev"), "There is no split 'dev'"),
        (lambda: ask(Copy(names=("abc",)), 0, [0], "test"), "make the task larger"),
    ),
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
