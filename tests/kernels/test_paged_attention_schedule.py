"""The schedule of a ragged call has each query once and only the pages it sees."""

import jax
import numpy as np
import pytest

from benchmarks.cases import paged_attention as cases
from pallas_kernels.paged_attention import schedule

PAGE = cases.SMALL.page
MAKE = jax.jit(schedule.make, static_argnames=("tokens", "block_q", "page", "window"))


def items(sequences, block_q, window):
    """The schedule of `sequences`, cut to the items in use, in numpy."""
    arrays = cases.draw(sequences)
    plan = MAKE(
        *(arrays["kv_lens"], arrays["cu_q_lens"]),
        **{"tokens": cases.ROOM.Tq, "block_q": block_q, "page": PAGE, "window": window},
    )
    plan = jax.tree.map(np.asarray, plan)
    return arrays, plan, int(plan.count)


def seen_pages(arrays, s, window, rows):
    """The pages with a key that a query of these rows sees, by definition."""
    last = arrays["kv_lens"][s] - arrays["cu_q_lens"][s + 1] + np.asarray(rows)
    return {
        j // PAGE
        for position in last
        for j in range(max(0, position - (window or 10**6) + 1), position + 1)
    }


RAGGED = [*cases.RAGGED.values(), *map(cases.random_ragged, range(20))]


@pytest.mark.parametrize("window", (None, 1, 6))
@pytest.mark.parametrize("block_q", (1, 4, 64))
def test_each_query_is_in_one_item_and_items_have_the_pages_they_see(block_q, window):
    for sequences in RAGGED:
        arrays, plan, count = items(sequences, block_q, window)
        bounds = arrays["cu_q_lens"]
        covered = []
        for w in range(count):
            s = plan.sequence[w]
            rows = range(plan.row[w], min(plan.row[w] + block_q, bounds[s + 1]))
            covered += rows
            assert plan.last[w] - plan.position[w] + 1 == len(rows)
            for row in rows:
                if plan.has_keys[row]:
                    assert plan.slot[row] == w * block_q + row - plan.row[w]
            want = seen_pages(arrays, s, window, rows)
            copied = set(range(plan.first_page[w], plan.end_page[w]))
            assert copied == want or (not want and len(copied) == 1)
        with_keys = [
            row
            for s, (queries, keys) in enumerate(sequences)
            for row in range(bounds[s], bounds[s] + queries)
            if keys > 0
        ]
        assert covered == with_keys
        assert not plan.has_keys[np.setdiff1d(np.arange(cases.ROOM.Tq), covered)].any()


@pytest.mark.parametrize("window", (None, 6))
def test_a_call_copies_no_page_that_is_not_in_use(window):
    """Where no sequence has more queries than an item, live pages once each."""
    for name in ("decode", "prefill", "chunks", "verify", "mixed", "empty", "full"):
        sequences = cases.RAGGED[name]
        arrays, plan, count = items(sequences, 64, window)
        copied = (plan.end_page - plan.first_page)[:count].sum()
        live = 0
        for s in range(len(sequences)):
            rows = range(*arrays["cu_q_lens"][s : s + 2])
            live += len(seen_pages(arrays, s, window, rows))
        assert live <= copied <= 1.1 * live


@pytest.mark.parametrize("block_q", (1, 3, 4, 64))
def test_the_bound_on_items_is_met(block_q):
    """Sequences of one query more than an item has need the most items."""
    queries = [min(block_q + 1, 12)] * 3
    count = items([(q, q) for q in queries], block_q, None)[2]
    assert count == sum(-(-q // block_q) for q in queries)
