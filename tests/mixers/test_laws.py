"""The laws that every mixer obeys. A new mixer is one more row of CASES."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import params
from jaxlab.mixers import (
    aaren,
    attention,
    delta_product,
    gla,
    lact,
    mamba,
    mamba2,
    mixer_of,
    mom,
    retnet,
)

WIDTH, B, T = 16, 2, 18
# Every other length a mixer is compiled for. Pieces of 6 tokens, three of which are T,
# end within blocks of 4 and with blocks of 3; one token has a program without chunks.
LENGTHS = (1, 6)

CASES = {
    "attention": attention.Config(WIDTH, n_heads=2),
    "attention_grouped": attention.Config(WIDTH, n_heads=4, n_kv_heads=2, qk_norm=True),
    "attention_window": attention.Config(WIDTH, n_heads=2, window=4),
    "delta_net": delta_product.Config(
        WIDTH, n_heads=2, n_householders=1, forget_gate=False, beta_max=1.0
    ),
    "gated_delta_net": delta_product.Config(WIDTH, n_heads=2, n_householders=1),
    "delta_product": delta_product.Config(
        WIDTH, n_heads=2, n_householders=2, value_size=12, chunk_size=4
    ),
    "delta_product_plain": delta_product.Config(
        WIDTH, n_heads=2, n_householders=3, convolution=0, output_gate=False
    ),
    "gla": gla.Config(WIDTH, n_heads=2, gate_rank=4),
    "gla_small_chunks": gla.Config(
        WIDTH, n_heads=2, key_size=6, value_size=10, gate_root=1.0, chunk_size=3
    ),
    "retnet": retnet.Config(WIDTH, n_heads=2, chunk_size=4),
    "mamba2": mamba2.Config(WIDTH, head_size=8, n_states=6),
    "mamba2_groups": mamba2.Config(
        WIDTH, head_size=4, n_states=4, n_groups=2, convolution=2, chunk_size=3
    ),
    "lact": lact.Config(WIDTH, n_heads=2, n_fast_heads=2, chunk_size=4),
    "lact_pre": lact.Config(
        WIDTH,
        n_heads=2,
        n_fast_heads=2,
        chunk_size=5,
        inter_multi=2,
        norm_placement="pre",
        newton_schulz="paper",
        scale_placement="attention",
    ),
    "lact_gradient_descent": lact.Config(
        WIDTH,
        n_heads=4,
        n_fast_heads=2,
        chunk_size=4,
        optimizer="gradient_descent",
        momentum=False,
        base_lr=0.1,
        init_rank=3,
    ),
    "mom": mom.Config(WIDTH, n_heads=2),
    "mom_delta_rule": mom.Config(
        WIDTH, n_heads=2, rule="delta_rule", shared_memory=False, value_size=12
    ),
    "mom_gated_linear_attention": mom.Config(
        WIDTH, n_heads=2, rule="gated_linear_attention", n_memories=5, top_k=3
    ),
    "mom_plain": mom.Config(
        WIDTH,
        n_heads=2,
        rule="linear_attention",
        top_k=4,
        convolution=0,
        output_gate=False,
    ),
    "mamba": mamba.Config(WIDTH, n_states=4),
    "mamba_small_chunks": mamba.Config(
        WIDTH, expand=1, n_states=3, dt_rank=2, convolution=2, chunk_size=3
    ),
    "aaren": aaren.Config(WIDTH, n_heads=2),
    "aaren_head_size": aaren.Config(WIDTH, n_heads=4, head_size=6),
}


def first_of_each():
    """The cases; the first of a mixer is quick, and its variants are slow."""
    seen = set()
    for name, cfg in CASES.items():
        yield pytest.param(name, marks=pytest.mark.slow if type(cfg) in seen else ())
        seen.add(type(cfg))


@pytest.fixture(params=first_of_each(), ids=str, scope="module")
def law(request):
    return Law(CASES[request.param])


class Law:
    """One mixer with random parameters and jitted functions, compiled once a shape."""

    def __init__(self, cfg):
        self.cfg, self.mixer = cfg, mixer_of(cfg)
        self.specs = self.mixer.spec(cfg)
        key = jax.random.key(1)
        self.params = params.init(self.specs, key)
        # NumPy's slices need no program each.
        self.x = np.asarray(jax.random.normal(key, (B, T, WIDTH)))
        self.run = jax.jit(functools.partial(self.mixer.forward, cfg=cfg))
        self.one = jax.jit(functools.partial(self.mixer.step, cfg=cfg))
        self._differentiated = jax.jit(self._with_pullback)

    def state(self):
        return self.mixer.init_state(self.cfg, B, 2 * T)

    def forward(self, x, **kwargs):
        return self.run(self.params, x, **kwargs)

    def whole(self, x):
        """The outputs and the state after one document, by the program for several."""
        return self.forward(x, segment_ids=row(*[0] * T), state=self.state())

    def outputs(self, x, **kwargs):
        return self.forward(x, **kwargs)[0]

    def pieces(self, x, lengths, state):
        """The outputs, and the state after, of one run a piece."""
        assert set(lengths) <= set(LENGTHS)
        for piece in np.split(x, np.cumsum(lengths)[:-1], axis=1):
            y, state = self.forward(piece, state=state)
            yield y, state

    def differentiated(self, x, segment_ids=None):
        """The outputs from no state, by the program that also has the gradients."""
        return self._differentiated(self.params, x, np.zeros_like(x), segment_ids)[0]

    def pullback(self, p, x, dy, segment_ids=None):
        """The gradients of sum(y dy) for the parameters and for x."""
        return self._differentiated(p, x, dy, segment_ids)[1]

    def _with_pullback(self, p, x, dy, segment_ids):
        forward = functools.partial(
            self.mixer.forward, cfg=self.cfg, segment_ids=segment_ids
        )
        y, vjp = jax.vjp(lambda p, x: forward(p, x)[0], p, x)
        return y, vjp(dy.astype(y.dtype))


def close(actual, expected, tolerance=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


def row(*ids):
    return np.tile(np.array(ids, np.int32), (B, 1))


def test_forward_equals_scan_of_step(law):
    state, ys = law.state(), []
    for t in range(T):
        y, state = law.one(law.params, law.x[:, t], state=state)
        ys.append(y)
    y, none = law.forward(law.x)
    assert none is None
    close(np.stack(ys, 1), y)
    y, final = law.whole(law.x)
    close(np.stack(ys, 1), y)
    close(state, final)
    close(law.differentiated(law.x[:, :1]), y[:, :1])


@pytest.mark.parametrize("lengths", [(6, 6, 6), (6, *[1] * 12)])
def test_split_with_state_equals_whole(law, lengths):
    whole, final = law.whole(law.x)
    ys, states = zip(*law.pieces(law.x, lengths, law.state()), strict=True)
    close(np.concatenate(ys, 1), whole)
    close(states[-1], final)


def test_causal_by_gradient(law):
    for t in (0, 6, T - 1):
        dy = np.zeros_like(law.x)
        dy[0, t] = 1
        _, grad = law.pullback(law.params, law.x, dy, row(*[0] * T))
        assert np.any(grad[0, t] != 0)
        assert not np.any(grad[0, t + 1 :]) and not np.any(grad[1:])


@pytest.mark.parametrize("segment_ids", [None, row(*[4] * 5, *[7] * 4, *[2] * 9)])
def test_causal_by_perturbation(law, segment_ids):
    """Changing token 7 of row 0 moves only later tokens of its own document."""
    change = law.x.copy()
    change[0, 7] += 1
    state = None if segment_ids is None else law.state()
    before = law.outputs(law.x, segment_ids=segment_ids, state=state)
    after = law.outputs(change, segment_ids=segment_ids, state=state)
    same = np.all(np.asarray(before) == np.asarray(after), axis=-1)
    expected = np.ones((B, T), bool)
    expected[0, 7 : T if segment_ids is None else 9] = False
    if getattr(law.cfg, "window", None):  # the window has passed by then
        expected[0, 7 + law.cfg.window :] = True
    np.testing.assert_array_equal(same, expected)


@pytest.mark.parametrize("last_id", [3, 0])
def test_packed_documents_equal_separate_runs(law, last_id):
    """Also where the last document has the id of the first again."""
    ids = row(*[0] * 6, *range(1, 7), *[last_id] * 6)
    packed, final = law.forward(law.x, segment_ids=ids, state=law.state())
    close(law.differentiated(law.x, ids), packed)
    first, _ = law.forward(law.x[:, :6], state=law.state())
    singles = [
        law.one(law.params, law.x[:, t], state=law.state())[0] for t in range(6, 12)
    ]
    last, state = law.forward(law.x[:, 12:], state=law.state())
    close(packed, np.concatenate([first, np.stack(singles, 1), last], 1))
    for t in range(3):  # the final state is the last document's
        y1, state = law.one(law.params, law.x[:, t], state=state)
        y2, final = law.one(law.params, law.x[:, t], state=final)
        close(y1, y2)


def test_state_belongs_to_the_first_document(law):
    _, state = law.whole(law.x)
    ids = row(*[5] * 6, *[6] * 12)
    y, _ = law.forward(law.x, segment_ids=ids, state=state)
    close(y[:, :6], law.forward(law.x[:, :6], state=state)[0])
    second = law.pieces(law.x[:, 6:], (6, 6), law.state())
    close(y[:, 6:], np.concatenate([y for y, _ in second], 1))


@pytest.mark.parametrize("left", [0, 3])
def test_padding_never_touches_a_state(law, left):
    _, state = law.whole(law.x[:, ::-1])
    document = slice(left, left + 6)
    plain, final = law.forward(law.x[:, document], state=state)
    ids = np.full((B, T), -1, np.int32)
    ids[:, document] = 0
    y, padded_final = law.forward(law.x, segment_ids=ids, state=state)
    close(y[:, document], plain)
    close(padded_final, final)
    assert np.all(np.isfinite(y))
    _, untouched = law.forward(law.x, segment_ids=np.full_like(ids, -1), state=state)
    close(untouched, state)


def test_padding_may_hold_anything(law):
    """NaN too, between and around documents: no output, state or gradient knows it."""
    ids = row(*[-1] * 2, *[0] * 5, -1, *[1] * 4, *[-1] * 6)
    present = ids[..., None] >= 0
    dirty = np.where(present, law.x, np.nan)
    dy = np.where(present, law.x[::-1], 0.0)

    def results(x):
        y, final = law.forward(x, segment_ids=ids, state=law.state())
        return np.where(present, y, 0), final, law.pullback(law.params, x, dy, ids)

    jax.tree.map(np.testing.assert_array_equal, results(dirty), results(law.x))


def test_what_is_not_finite_stays_in_its_document(law):
    """In tokens or states: outputs and gradients of other documents are the same."""
    ids = np.stack([np.repeat([0, 1, 2], [5, 5, 8]), np.repeat([0, 1, -1], [6, 6, 6])])
    x, state = law.x.copy(), law.state()
    lost = np.zeros((B, T), bool)
    x[0, 7], lost[0, 7:10] = np.nan, True
    x[1, 9], lost[1, 9:12] = np.inf, True
    dy = np.where(lost[..., None], 0.0, law.x[::-1])
    want, _ = law.forward(law.x, segment_ids=ids, state=state)
    got, final = law.forward(x, segment_ids=ids, state=state)
    np.testing.assert_array_equal(got[~lost], np.asarray(want)[~lost])
    assert np.all(np.isnan(np.asarray(got)[lost]))
    for leaf in jax.tree.leaves(final):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert np.all(np.isfinite(leaf[0])) and np.all(np.isnan(leaf[1]))
    d_params, d_x = law.pullback(
        law.params, x, np.where(lost[..., None], np.nan, dy), ids
    )
    want_params, want_x = law.pullback(law.params, law.x, dy, ids)
    np.testing.assert_array_equal(np.asarray(d_x)[~lost], np.asarray(want_x)[~lost])
    close(d_params, want_params)

    _, broken = law.forward(law.x * np.inf, segment_ids=ids, state=state)
    y = np.asarray(law.outputs(law.x, segment_ids=ids, state=broken))
    assert np.all(np.isnan(y[ids == 0])) and np.all(np.isfinite(y[ids > 0]))


def test_rows_do_not_mix(law):
    y = law.outputs(law.x)
    close(law.outputs(law.x[::-1]), y[::-1], 1e-6)


@pytest.mark.parametrize("length", [1, T])
def test_gradients_are_finite_and_reach_every_parameter(law, length):
    """The gradients of the sum of y^2."""
    x = law.x[:, :length]
    ids = None if length == 1 else row(*[0] * T)
    dy = 2 * np.asarray(law.outputs(law.x))[:, :length]
    grads, _ = law.pullback(law.params, x, dy, ids)
    for name, grad in grads.items():
        assert np.all(np.isfinite(grad)), name
        assert length == 1 or np.any(grad != 0), name


def test_bfloat16_is_within_its_rounding(law):
    """Inputs are rounded to 2^-9; twenty roundings in series bound the output."""
    y = law.outputs(law.x)
    y_bf16 = law.outputs(law.x.astype(jnp.bfloat16))
    assert y_bf16.dtype == jnp.bfloat16
    error = jnp.linalg.norm(y_bf16.astype(jnp.float32) - y) / jnp.linalg.norm(y)
    assert error < 20 * 2**-9


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_a_state_keeps_its_shapes_and_dtypes(law, dtype):
    state = law.state()
    kept = jax.tree.map(lambda a: (a.shape, a.dtype), state)
    for function, x in ((law.mixer.forward, law.x), (law.mixer.step, law.x[:, 0])):
        f = functools.partial(function, cfg=law.cfg)
        y, new = jax.eval_shape(f, law.params, x.astype(dtype), state=state)
        assert y.dtype == dtype
        assert jax.tree.map(lambda a: (a.shape, a.dtype), new) == kept


def test_a_state_of_another_batch_is_refused(law):
    state = law.mixer.init_state(law.cfg, B + 1, 2 * T)
    for function, x in ((law.mixer.forward, law.x), (law.mixer.step, law.x[:, 0])):
        with pytest.raises(ValueError, match="another Config or batch; make one with"):
            jax.eval_shape(
                functools.partial(function, cfg=law.cfg), law.params, x, state=state
            )


def test_what_it_is_called_with_is_checked(law):
    """The input's shape, and that a step has a state, of this mixer."""
    forward, step = (
        functools.partial(f, cfg=law.cfg) for f in (law.mixer.forward, law.mixer.step)
    )
    state, other = law.state(), {"of": jnp.zeros((B, 1))}
    for call, message in (
        (
            lambda: forward(law.params, law.x[..., :-1]),
            "takes x of shape .*time, width",
        ),
        (lambda: forward(law.params, law.x[:, 0]), "takes x of shape .*time, width"),
        (
            lambda: step(law.params, law.x, state=state),
            "takes x of shape .batch, width",
        ),
        (lambda: step(law.params, law.x[:, 0], state=None), "needs a state"),
        (lambda: forward(law.params, law.x[:, :0]), "without a token"),
        (lambda: forward(law.params, law.x[:0]), "without a token"),
        (
            lambda: forward(law.params, law.x, segment_ids=row(*[0] * (T - 1))),
            r"segment_ids have shape \(2, 17\), .* \[batch, time\] = \(2, 18\)",
        ),
        (lambda: step(law.params, law.x[:, 0], state=other), "belongs to another"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(call)


def test_types_and_weights_are_checked(law):
    forward = functools.partial(law.mixer.forward, cfg=law.cfg)
    step = functools.partial(law.mixer.step, cfg=law.cfg, state=law.state())
    ids = np.zeros((B, T), np.float32)
    for call, message in (
        (lambda: forward(law.params, law.x.tolist()), "x is a list, but must be an ar"),
        (lambda: forward(law.params, law.x.astype(int)), "x has dtype int"),
        (lambda: step(law.params, law.x[:, 0].astype(np.float16)), "dtype float16"),
        (
            lambda: forward(law.params, law.x, segment_ids=ids),
            "segment_ids has dtype float32, but must hold integers",
        ),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    name = next(iter(law.params))
    fewer = {other: w for other, w in law.params.items() if other != name}
    more = law.params | {"w_other": law.params[name]}
    wider = law.params | {name: law.params[name][..., :-1]}
    for weights, message in (
        (fewer, f"The weights lack '{name}'"),
        (more, "The weights have 'w_other'"),
        (wider, f"The weight '{name}' has shape"),
    ):
        for call, x in ((forward, law.x), (step, law.x[:, 0])):
            with pytest.raises(ValueError, match=message):
                call(weights, x)


def test_spec_shapes_equal_init_shapes(law):
    for name, spec in law.specs.items():
        assert law.params[name].shape == spec.shape
        assert law.params[name].dtype == spec.dtype


def test_any_leaf_can_be_a_weight(law):
    """Low-rank members with zero factors and tapped weights change nothing."""

    def wrap(spec, w):
        if spec.role != "matrix":
            return w
        zeros = (jnp.zeros((*w.shape[:-2], size, 1)) for size in w.shape[-2:])
        return params.tapped(params.LowRank(w, *zeros))

    wrapped = {name: wrap(law.specs[name], w) for name, w in law.params.items()}
    y, _ = law.run(wrapped, law.x)
    close(y, law.outputs(law.x), 1e-6)


def test_sharded_equals_single_device(law):
    mesh = params.make_mesh(params.MeshConfig(data=2, fsdp=2, tensor=2))
    x = np.concatenate([law.x, law.x])
    with jax.set_mesh(mesh):
        sharded = jax.device_put(law.params, params.shardings(law.specs, mesh))
        rows = jax.NamedSharding(mesh, params.partition_spec(("batch", None, None)))
        y, _ = jax.jit(functools.partial(law.mixer.forward, cfg=law.cfg))(
            sharded, jax.device_put(x, rows)
        )
    close(y, np.concatenate([law.outputs(law.x)] * 2))


def test_config_has_width_first_and_defaults(law):
    fields = dataclasses.fields(law.cfg)
    assert fields[0].name == "width"
    assert all(f.default is not dataclasses.MISSING for f in fields[1:])
