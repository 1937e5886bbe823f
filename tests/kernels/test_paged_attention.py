"""Paged attention against a float64 oracle, on ragged batches of poisoned caches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_attention_law import assert_law, bfloat16_error, compiled
from paged_attention_oracle import paged_attention as oracle

from benchmarks.cases import paged_attention as cases
from pallas_kernels import programs
from pallas_kernels.paged_attention import paged_attention

# Queries an item, pages a block, units a step; None for those of the call.
SIZES = (None, (1, 1, 1), (4, 2, 3), (16, 3, 16))


MASKS = ({}, {"window": 5, "soft_cap": 2.0}, {"window": 1}, {"window": 1000})


@pytest.mark.parametrize("masks", MASKS, ids=str)
@pytest.mark.parametrize("name", cases.RAGGED)
def test_law(name, masks):
    arrays = cases.draw(cases.RAGGED[name])
    want = oracle(**arrays, **masks)
    for implementation in ("reference", "xla"):
        got = compiled(implementation=implementation, **masks)(**arrays)
        assert_law(got, want, cases.RAGGED[name])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("seed", range(6))
def test_law_at_any_shape_and_block_size(seed, sizes):
    sequences = cases.random_ragged(seed)
    arrays = cases.draw(sequences, seed=seed)
    got = compiled(sizes, implementation="xla", window=9)(**arrays)
    assert_law(got, oracle(**arrays, window=9), sequences)


@pytest.mark.parametrize("keys", (0, 1, 3, 4, 5, 47, 48))
def test_law_beside_the_end_of_a_page(keys):
    """One decoded token, the whole as a prompt, and a window of all keys."""
    for queries in {min(keys, 1), min(keys, cases.ROOM.Tq)}:
        arrays = cases.draw([(queries, keys)])
        for settings in ({}, {"window": 1000}):
            got = compiled((4, 2, 3), implementation="xla", **settings)(**arrays)
            assert_law(got, oracle(**arrays), [(queries, keys)])


def test_oracle_is_softmax_attention():
    """On one prompt in pages in order it is what a dense formula says."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 8, 1, 4))
    pages = {"k_pages": k.reshape(2, 4, 1, 4), "v_pages": v.reshape(2, 4, 1, 4)}
    o, lse = oracle(q, **pages, page_table=[[0, 1]], kv_lens=[8], cu_q_lens=[0, 8])
    scores = np.where(np.tri(8, dtype=bool), q[:, 0] @ k[:, 0].T / 2, -np.inf)
    weights = np.exp(scores)
    np.testing.assert_allclose(lse[:, 0], np.log(weights.sum(1)), rtol=1e-13)
    np.testing.assert_allclose(
        o[:, 0], weights @ v[:, 0] / weights.sum(1, keepdims=True), rtol=1e-13
    )


@pytest.mark.parametrize("pages", cases.QUANTISED)
def test_quantised_pages_with_a_scale_a_token(pages):
    sequences = cases.RAGGED["mixed"]
    arrays = cases.draw(sequences, pages=pages)
    want = oracle(**arrays, window=9)
    for implementation, sizes in (("reference", None), ("xla", (4, 2, 3))):
        got = compiled(sizes, implementation=implementation, window=9)(**arrays)
        assert_law(got, want, sequences)


def test_quantised_pages_with_one_scale():
    sequences = cases.RAGGED["mixed"]
    arrays = cases.draw(sequences, pages="int8")
    arrays |= {"k_scale": np.float32(0.02), "v_scale": np.float32(0.01)}
    want = oracle(**arrays, scale=0.3)
    for implementation in ("reference", "xla"):
        got = compiled(implementation=implementation, scale=0.3)(**arrays)
        assert_law(got, want, sequences)


def test_float64_is_the_oracle():
    arrays = cases.draw(cases.RAGGED["mixed"], dtype="float64")
    want = oracle(**arrays, soft_cap=3.0)
    with jax.enable_x64():
        for implementation in ("reference", "xla"):
            got = compiled(implementation=implementation, soft_cap=3.0)(**arrays)
            for x, y in zip(got, want, strict=True):
                assert x.dtype == jnp.float64
                np.testing.assert_allclose(x, y, rtol=0, atol=1e-14)


@pytest.mark.parametrize("pages", (None, "int8", "float8_e4m3fn"))
@pytest.mark.parametrize("name", ("mixed", "chunks"))
def test_bfloat16_errs_at_most_twice_the_reference(name, pages):
    arrays = cases.draw(cases.RAGGED[name], dtype="bfloat16", pages=pages)
    want, _ = oracle(**arrays)
    of_reference = bfloat16_error(arrays, want, implementation="reference")
    for sizes in ((4, 2, 3), (1, 1, 1)):
        got = bfloat16_error(arrays, want, sizes=sizes, implementation="xla")
        assert got <= 2 * of_reference


@pytest.mark.parametrize("implementation", ("reference", "xla"))
def test_where_pages_lie_does_not_matter(implementation):
    """The same bits from a cache in another order."""
    arrays = cases.draw(cases.RAGGED["mixed"], pages="int8")
    order = np.random.default_rng(1).permutation(cases.ROOM.P)  # old numbers by new
    place = np.argsort(order)
    names = ("k_pages", "v_pages", "k_scale", "v_scale")
    moved = arrays | {name: arrays[name][order] for name in names}
    table = arrays["page_table"]
    known = (table >= 0) & (table < cases.ROOM.P)
    moved["page_table"] = np.where(known, place[table * known], table).astype(np.int32)
    call = compiled(implementation=implementation)
    for x, y in zip(call(**arrays), call(**moved), strict=True):
        np.testing.assert_array_equal(x, y)


def test_other_requests_do_not_matter():
    """A sequence alone has what it has beside others, up to rounding."""
    sequences = cases.RAGGED["mixed"]
    arrays = cases.draw(sequences)
    call = compiled((4, 2, 3), implementation="xla")
    together, _ = call(**arrays)
    bounds = arrays["cu_q_lens"]
    for s, (queries, _) in enumerate(sequences):
        alone = dict(arrays)
        for name in ("page_table", "kv_lens"):
            alone[name] = np.concatenate([arrays[name][s:], 0 * arrays[name][:s]])
        alone["cu_q_lens"] = np.minimum(np.arange(len(bounds)), 1) * np.int32(queries)
        alone["q"] = np.roll(arrays["q"], -bounds[s], axis=0)
        o, _ = call(**alone)
        np.testing.assert_allclose(
            o[:queries], together[bounds[s] : bounds[s] + queries], atol=1e-6
        )


def test_no_queries_at_all():
    arrays = cases.draw([], room=cases.ROOM._replace(Tq=0), dtype="bfloat16")
    for implementation in ("reference", "xla"):
        o, lse = compiled(implementation=implementation)(**arrays)
        assert o.shape == (0, 4, 16) and o.dtype == jnp.bfloat16
        assert lse.shape == (0, 4) and lse.dtype == jnp.float32


def test_vmap_is_a_call_a_batch():
    batches = [cases.draw(cases.RAGGED[name]) for name in ("mixed", "empty")]
    names = [name for name in batches[0] if batches[0][name] is not None]
    stacked = {name: np.stack([batch[name] for batch in batches]) for name in names}
    call = compiled((4, 2, 3), implementation="xla")
    got = jax.vmap(lambda arrays: call(**arrays))(stacked)
    for i, batch in enumerate(batches):
        for x, y in zip(got, call(**{n: batch[n] for n in names}), strict=True):
            np.testing.assert_allclose(x[i], y, atol=1e-6)


def test_reference_has_a_gradient():
    """That of the oracle, by finite differences in a random direction."""
    arrays = cases.draw(cases.RAGGED["empty"])
    direction = np.random.default_rng(0).standard_normal(arrays["q"].shape)

    def loss(q):
        return paged_attention(**arrays | {"q": q}, implementation="reference").sum()

    gradient = np.asarray(jax.jit(jax.grad(loss))(arrays["q"]), np.float64)
    ahead, behind = (
        oracle(**arrays | {"q": arrays["q"] + step * direction})[0].sum()
        for step in (1e-4, -1e-4)
    )
    slope = (ahead - behind) / 2e-4
    assert abs((gradient * direction).sum() - slope) <= 1e-5 * abs(slope)


def test_the_way_the_memory_goes():
    """Temporaries are far from the scores of all queries with all pages of a table."""
    heads = cases.Heads(Hq=8, Hkv=2, D=64, page=16)
    room = cases.Room(S=8, Tq=256, P=512, pages_per_seq=1024)
    _, shapes = programs.paged_attention(heads, room, "float32")
    names = ("q", "k_pages", "v_pages", "page_table", "kv_lens", "cu_q_lens")
    arrays = dict(zip(names, shapes, strict=True))
    memory = compiled(implementation="xla").lower(**arrays).compile().memory_analysis()
    scores = 4 * heads.Hq * room.Tq * room.pages_per_seq * heads.page
    assert memory.temp_size_in_bytes < scores / 8
