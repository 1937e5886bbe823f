"""Mixture-of-Memories against every memory run over the whole sequence, in float64.

The oracle knows no sorting, no stream and no chunk: a scan over tokens in which each
memory holds its state and its last inputs, and stands still unless the token is its
own.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import params
from jaxlab.mixers import mom

WIDTH, B, T = 12, 2, 37
CASES = {
    "gated_delta_rule": mom.Config(WIDTH, n_heads=2, value_size=5),
    "delta_rule": mom.Config(
        WIDTH, n_heads=2, rule="delta_rule", top_k=1, convolution=1
    ),
    "gated_linear_attention": mom.Config(
        WIDTH, n_heads=2, rule="gated_linear_attention", convolution=2
    ),
    "not_shared": mom.Config(
        WIDTH, n_heads=2, shared_memory=False, output_gate=False, n_memories=3
    ),
    "no_convolution": mom.Config(WIDTH, n_heads=2, convolution=0, chunk_size=4),
    "linear_attention": mom.Config(WIDTH, n_heads=2, rule="linear_attention"),
}
ONE_DOCUMENT = np.zeros((B, T), np.int32)
# Three documents (one of a single token), and padding at both ends of a row.
DOCUMENTS = np.array(
    [[3] * 10 + [5] + [3] * 26, [-1] * 4 + [0] * 20 + [1] * 8 + [-1] * 5], np.int32
)


def oracle(p, x, cfg, state, ids):
    """Outputs and final state, token by token; arrays of one dtype, documents `ids`."""
    H, K, V, k, W = cfg.n_heads, cfg.K, cfg.V, cfg.top_k, cfg.convolution
    M, dtype = cfg.n_memories + cfg.shared_memory, x.dtype
    probabilities = jax.nn.softmax(x @ p["w_router"])
    ranks = jnp.sum(probabilities[..., None, :] > probabilities[..., None], axis=-1)
    weights = probabilities * (ranks < k).astype(dtype)
    weights = weights / jnp.sum(weights, -1, keepdims=True)
    if cfg.shared_memory:
        weights = jnp.concatenate([weights, jnp.ones((*x.shape[:2], 1), dtype)], -1)
        ranks = jnp.pad(ranks, ((0, 0), (0, 0), (0, 1)))
    chosen_BTM = (ranks < k) & (ids >= 0)[..., None]

    first_id = jax.vmap(lambda row: row[jnp.argmax(row >= 0)])(ids)
    before = jnp.concatenate([first_id[:, None], ids[:, :-1]], 1)
    before = jnp.where(before < 0, first_id[:, None], before)
    opens_BT = (ids != before) & (ids >= 0)

    inputs = {
        "conv_q": jnp.broadcast_to((x @ p["w_q"])[:, :, None], (B, T, M, H * K)),
        "conv_k": jnp.einsum("btd,mdc->btmc", x, p["w_k"]),
        "conv_v": jnp.einsum("btd,mdc->btmc", x, p["w_v"]),
    }
    one, zero = jnp.ones((), dtype), jnp.zeros((), dtype)
    beta = decay = None
    if "w_beta" in p:
        beta = jax.nn.sigmoid(jnp.einsum("btd,mdh->btmh", x, p["w_beta"]))
    if "w_decay" in p:
        dt = jnp.einsum("btd,mdh->btmh", x, p["w_decay"]) + p["dt_bias"][None, None]
        decay = jnp.exp(-jnp.exp(p["a_log"]) * jax.nn.softplus(dt))

    def unit(a):
        return a / jnp.sqrt(jnp.sum(a * a, -1, keepdims=True) + 1e-6)

    def token(carry, t):
        S, tails = carry
        S = jnp.where(opens_BT[:, t, None, None, None, None], zero, S)
        own = chosen_BTM[:, t]
        heads, new_tails = {}, {}
        for name, a in inputs.items():
            a = a[:, t]
            if W:
                tail = jnp.where(opens_BT[:, t, None, None, None], zero, tails[name])
                window = jnp.concatenate([tail, a[:, :, None]], 2)
                a = jnp.einsum("bmwc,wc->bmc", window, p[name])
                new_tails[name] = jnp.where(
                    own[..., None, None], window[:, :, 1:], tail
                )
            heads[name] = jax.nn.silu(a).reshape(B, M, H, -1)
        q, key, v = unit(heads["conv_q"]), unit(heads["conv_k"]), heads["conv_v"]
        moves = own[..., None]
        if decay is not None:
            S = S * jnp.where(moves, decay[:, t], one)[..., None, None]
        write = v
        if beta is not None:
            held = jnp.einsum("bmhkv,bmhk->bmhv", S, key)
            write = beta[:, t, ..., None] * (v - held)
        write = jnp.where(moves[..., None], write, zero)
        S = S + jnp.einsum("bmhk,bmhv->bmhkv", key, write)
        o = K**-0.5 * jnp.einsum("bmhkv,bmhk->bmhv", S, q)
        return (S, new_tails), jnp.einsum("bmhv,bm->bhv", o, weights[:, t])

    tails = {name: state[name] for name in inputs if W}
    (S, tails), o = jax.lax.scan(token, (state["memory"], tails), jnp.arange(T))
    o = jnp.moveaxis(o, 0, 1)
    o = p["norm"] * o / jnp.sqrt(jnp.mean(o * o, -1, keepdims=True) + 1e-6)
    o = o.reshape(B, T, H * V)
    if cfg.output_gate:
        o = o * jax.nn.silu(x @ p["w_gate"])
    return o @ p["w_o"], {"memory": S} | tails


ROUTINGS = ("random", "collapsed")


@functools.cache
def setup(case, routing):
    """Parameters and inputs; collapsed routing sends all tokens to the same memories.

    The inputs' first entry is constant, so that the router can prefer a memory.
    """
    cfg = CASES[case]
    keys = iter(jax.random.split(jax.random.key(7), 20))
    p = params.init(mom.spec(cfg), next(keys))
    x = jax.random.normal(next(keys), (B, T, WIDTH)).at[..., 0].set(1.0)
    if routing == "collapsed":
        preference = jnp.linspace(9.0, 0.0, cfg.n_memories)
        p["w_router"] = (0.1 * p["w_router"]).at[0].set(preference)
    state = jax.tree.map(
        lambda a: 0.3 * jax.random.normal(next(keys), a.shape),
        mom.init_state(cfg, B),
    )
    return cfg, p, x, state


def as_dict(state):
    names = ("conv_q", "conv_k", "conv_v")[: len(state.tails)]
    return {"memory": state.memory} | dict(zip(names, state.tails, strict=True))


def near(actual, expected, bound, what):
    """Rounding, in norm; of terms of size 1 where they cancel, as for top_k=1 they do
    in the router's gradient."""
    error = np.linalg.norm(np.asarray(actual, np.float64) - expected)
    assert error <= bound * max(1, np.linalg.norm(expected)), (what, error)


def ours(p, x, cfg, state, ids):
    y, final = mom.forward(p, x, cfg, state=state, segment_ids=ids)
    return y, as_dict(final)


def theirs(p, x, cfg, state, ids):
    return oracle(p, x, cfg, as_dict(state), ids)


def loss(p, x, state, ids, d_y, d_S, cfg, run):
    y, final = run(p, x, cfg, state, ids)
    weigh = lambda a, d: jnp.sum(a * d.astype(a.dtype))  # noqa: E731
    return weigh(y, d_y) + weigh(final["memory"], d_S), (y, final)


# One program for both routings and all documents.
gradients = jax.jit(
    jax.grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnames=("cfg", "run")
)
forward = jax.jit(mom.forward, static_argnames="cfg")
step = jax.jit(mom.step, static_argnames="cfg")


def first_is_quick(cases):
    """Cases that compile programs of their own, of which `make test` runs one."""
    return [
        pytest.param(c, marks=pytest.mark.slow if i else ())
        for i, c in enumerate(cases)
    ]


def cotangents(state, real):
    """Of the outputs of real tokens, and of the final memories."""
    rng = np.random.default_rng(0)
    d_y = rng.normal(size=(B, T, WIDTH)).astype(np.float32) * real[..., None]
    return d_y, rng.normal(size=state.memory.shape).astype(np.float32)


@pytest.mark.parametrize("ids", [ONE_DOCUMENT, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("case", first_is_quick(CASES))
def test_equals_every_memory_over_the_whole_sequence(case, routing, ids):
    """Outputs, final states and all gradients, to float32 rounding."""
    cfg, p, x, state = setup(case, routing)
    real = ids >= 0
    d_y, d_S = cotangents(state, real)

    grads, (y, final) = gradients(p, x, state, ids, d_y, d_S, cfg, ours)
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (p, x, state))
        reference = gradients(*wide, ids, d_y, d_S, cfg, theirs)
        grads_64, (y_64, final_64) = jax.device_get(reference)
    near(y[real], y_64[real], 2e-6, "y")
    for name in final:
        near(final[name], final_64[name], 2e-6, name)
    for (path, a), b in zip(
        params.named_leaves(grads), jax.tree.leaves(grads_64), strict=True
    ):
        assert np.all(np.isfinite(a)), path
        near(a, b, 2e-5, path)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_row_without_ids_is_one_document(routing):
    cfg, p, x, state = setup("gated_delta_rule", routing)
    d_y, d_S = cotangents(state, ONE_DOCUMENT >= 0)
    without, with_ids = (
        gradients(p, x, state, ids, d_y, d_S, cfg, ours) for ids in (None, ONE_DOCUMENT)
    )
    names = [path for path, _ in params.named_leaves(with_ids)]
    pairs = zip(jax.tree.leaves(without), jax.tree.leaves(with_ids), strict=True)
    for name, (a, b) in zip(names, pairs, strict=True):
        near(a, np.asarray(b, np.float64), 2e-6, name)


def test_collapsed_routing_leaves_memories_empty():
    """The hard case above is what it says: some memories get all tokens, some none."""
    cfg, p, x, _ = setup("gated_delta_rule", "collapsed")
    _, final = forward(p, x, cfg, state=mom.init_state(cfg, B))
    used = np.any(np.asarray(final.memory) != 0, axis=(0, 2, 3, 4))
    np.testing.assert_array_equal(used, [True, True, False, False, True])


@pytest.mark.parametrize("cut", [1, 20, 36])
def test_the_future_does_not_leak_into_training(cut):
    """Routing of later tokens moves rows about, and no earlier output."""
    cfg, p, x, _ = setup("gated_delta_rule", "random")
    other = jax.random.normal(jax.random.key(5), x.shape)
    changed = x.at[:, cut:].set(other[:, cut:])
    before, after = forward(p, x, cfg)[0], forward(p, changed, cfg)[0]
    near(after[:, :cut], np.asarray(before[:, :cut]), 1e-6, cut)
    assert np.linalg.norm(after[:, cut:] - before[:, cut:]) > 1


@pytest.mark.parametrize(
    "case", first_is_quick(["gated_linear_attention", "gated_delta_rule"])
)
@pytest.mark.parametrize("prefix", [0, 1, 5, 36])
def test_decoding_after_a_prefix_equals_the_parallel_form(case, prefix):
    cfg, p, x, _ = setup(case, "random")
    x = np.asarray(x)  # its slices need no programs
    whole, final = forward(p, x, cfg, state=mom.init_state(cfg, B))
    state, ys = mom.init_state(cfg, B), []
    if prefix:
        y, state = forward(p, x[:, :prefix], cfg, state=state)
        ys.append(y)
    for t in range(prefix, T):
        y, state = step(p, x[:, t], cfg, state)
        ys.append(np.asarray(y)[:, None])
    near(np.concatenate(ys, 1), np.asarray(whole), 2e-6, "y")
    jax.tree.map(lambda a, b: near(a, np.asarray(b), 2e-6, "state"), state, final)


def test_a_step_touches_only_the_memories_of_its_tokens():
    """What the others hold, were it NaN, is neither read nor written."""
    cfg, p, x, state = setup("gated_delta_rule", "collapsed")  # uses 0, 1 and shared
    poisoned = jax.tree.map(lambda a: a.at[:, 2:4].set(jnp.nan), state)
    y, after = step(p, x[:, 0], cfg, poisoned)
    expected, _ = step(p, x[:, 0], cfg, state)
    np.testing.assert_array_equal(y, expected)
    for a in jax.tree.leaves(after):
        assert np.all(np.isnan(a[:, 2:4]))
        assert not np.any(np.isnan(a[:, :2])) and not np.any(np.isnan(a[:, 4:]))


def test_devices_share_the_rows_of_a_batch():
    """Each sorts and runs its own: four devices need a quarter of the memory each."""
    cfg, p, _, _ = setup("gated_delta_rule", "random")
    x = jnp.zeros((8, 128, WIDTH))
    run = lambda p, x: mom.forward(p, x, cfg)[0]  # noqa: E731
    memory = lambda program: program.memory_analysis().temp_size_in_bytes  # noqa: E731
    alone = memory(jax.jit(run).lower(p, x).compile())
    mesh = params.make_mesh(params.MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        specs = params.shardings(mom.spec(cfg), mesh)
        rows = jax.NamedSharding(mesh, params.partition_spec(("batch",)))
        sharded = jax.device_put(p, specs), jax.device_put(x, rows)
        shared = memory(jax.jit(run).lower(*sharded).compile())
    assert shared < 0.35 * alone


def balance(p, x, cfg, ids=None):
    """The Switch loss in numpy, a token at a time."""
    M, k = cfg.n_memories, cfg.top_k
    share, mean, tokens = np.zeros(M), np.zeros(M), 0
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            if ids is not None and ids[b, t] < 0:
                continue
            logits = np.asarray(x[b, t], np.float64) @ np.asarray(p["w_router"])
            probabilities = np.exp(logits) / np.exp(logits).sum()
            share[np.argsort(-probabilities)[:k]] += 1
            mean += probabilities
            tokens += 1
    return cfg.balance_weight * M * np.sum(share / tokens * mean / tokens)


@pytest.mark.parametrize("ids", [None, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_balance_loss(routing, ids):
    cfg, p, x, _ = setup("gated_delta_rule", routing)
    loss = mom.auxiliary_loss(p, x, cfg, segment_ids=ids)
    assert loss.dtype == jnp.float32 and loss.shape == ()
    np.testing.assert_allclose(loss, balance(p, x, cfg, ids), rtol=1e-5)


def test_balance_loss_of_padding_alone_is_zero():
    cfg, p, x, _ = setup("gated_delta_rule", "random")
    ids = jnp.full((B, T), -1, jnp.int32)
    assert mom.auxiliary_loss(p, x, cfg, segment_ids=ids) == 0


def test_balance_loss_is_least_for_equal_use():
    """Equal use gives weight * top_k; descent from collapsed routing ends there."""
    cfg = mom.Config(4, n_heads=2, n_memories=4, top_k=1)
    x = jnp.tile(jnp.eye(4), (2, 1))[None]  # a token in favour of each memory
    loss = jax.jit(lambda w: mom.auxiliary_loss({"w_router": w}, x, cfg))
    least = cfg.balance_weight * cfg.top_k
    np.testing.assert_allclose(loss(3 * jnp.eye(4)), least, rtol=1e-6)
    w = jnp.eye(4) + jnp.array([2.0, 1.0, 0.0, -1.0])[None]
    assert loss(w) > 2 * least
    for _ in range(200):
        w = w - 20 * jax.grad(loss)(w)
    assert least * (1 - 1e-5) < loss(w) < 1.02 * least


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 5}, "top_k=5 is above n_memories=4"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"n_memories": 0}, "n_memories=0 must be at least 1"),
        ({"n_heads": 5}, "width=32 is not divisible by n_heads=5"),
        ({"rule": "hebb"}, "rule='hebb' is not one of .*gated_delta_rule"),
        ({"convolution": -1}, "convolution=-1 taps"),
        ({"balance_weight": -0.1}, "balance_weight=-0.1 is below 0"),
        ({"chunk_size": 0}, "chunk_size=0 must be"),
    ],
)
def test_errors_name_the_value_and_the_rule(changes, message):
    with pytest.raises(ValueError, match=message):
        mom.Config(32, **changes)
