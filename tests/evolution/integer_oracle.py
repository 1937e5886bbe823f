"""The integer model in loops over unbounded integers, and helpers for its tests."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab import params as parameters
from jaxlab.evolution.integer import IntegerEGGROLL
from jaxlab.evolution.integer import integer_model as model
from jaxlab.evolution.integer.integer_model import Config
from jaxlab.evolution.integer.strategy import Outer, Product

KEY = jax.random.key(3)
TINY = Config(width=4, layers=2, vocab_size=7, separator=6)
SMALL = Config(width=16, layers=2, vocab_size=11, separator=10)
ES = IntegerEGGROLL(8, members_per_sequence=4, table_size=2**10, generations=100)


@functools.cache
def start(es=ES, cfg=TINY, size=1):
    """A strategy, its state and weights; `size` makes many of them saturate."""

    @jax.jit
    def weights(key):
        drawn = parameters.init(model.spec(cfg), key)

        def enlarged(w):
            return model.saturate(w.astype(jnp.int32) * size)

        return jax.tree.map(enlarged, drawn)

    strategy, drawn = es.build(cfg), weights(jax.random.key(1))
    return strategy, strategy.init(drawn, KEY), drawn


@functools.cache
def stepping(strategy):
    return jax.jit(strategy.step)


@functools.cache
def noise_of(strategy):
    """The function of a state and the numbers of directions to their noise."""
    return jax.jit(jax.vmap(strategy.noise, (None, 0)))


forward = jax.jit(model.forward, static_argnums=2)
segment_loss = jax.jit(model.segment_loss, static_argnums=2)


def text(cfg, rows, length, seed=0):
    """Random ids, including separators."""
    return np.random.default_rng(seed).integers(
        0, cfg.vocab_size, (rows, length), np.int32
    )


def clip(x):
    return max(-127, min(127, x))


def floor_divide(x, y):
    return (x - x % y) // y  # an exact division, so rounding plays no role


class Oracle:
    """The model of one member in loops, with its noise as full matrices.

    Args:
        noise: tree of pairs (a, b), or None for the parameters themselves.
    """

    def __init__(self, cfg, weights, noise=None, sign=1, sigma_shift=4):
        self.cfg, self.divisor = cfg, 2 ** (4 + sigma_shift)
        self.w, self.e = {}, {}
        for name, w in parameters.named_leaves(weights):
            self.w[name] = np.asarray(w).tolist()
        if noise is not None:
            leaves = jax.tree.leaves(
                noise, is_leaf=lambda x: isinstance(x, Outer | Product)
            )
            for name, e in zip(self.w, leaves, strict=True):
                a, b = (np.asarray(x).astype(object) * 1 for x in e)
                whole = a[..., :, None] * b[..., None, :] if type(e) is Outer else a * b
                self.e[name] = (sign * whole).tolist()

    def get(self, tree, name, layer):
        value = tree.get(name)
        return value if layer is None or value is None else value[layer]

    def linear(self, u, name, layer=None):
        w, e = self.get(self.w, name, layer), self.get(self.e, name, layer)
        out = []
        for j in range(len(w[0])):
            total = sum(u[i] * w[i][j] for i in range(len(u)))
            if e is not None:
                moved = sum(u[i] * e[i][j] for i in range(len(u)))
                total += floor_divide(moved, self.divisor)
            out.append(clip(floor_divide(total, 16 * math.isqrt(len(u)))))
        return out

    def vector(self, name, layer=None):
        w, e = self.get(self.w, name, layer), self.get(self.e, name, layer)
        if e is None:
            return w
        return [
            clip(x + floor_divide(y, self.divisor)) for x, y in zip(w, e, strict=True)
        ]

    def embed(self, token):
        w, e = self.w["embedding"][token], self.e.get("embedding")
        if e is None:
            return w
        moved = zip(w, e[token], strict=True)
        return [clip(x + floor_divide(y, self.divisor)) for x, y in moved]

    def norm(self, x, name, layer=None):
        mean = max(1, floor_divide(sum(map(abs, x)), len(x)))
        scale = zip(x, self.vector(name, layer), strict=True)
        return [clip(floor_divide(a * b, mean)) for a, b in scale]

    def cell(self, x, s, layer):
        def name(n):
            return f"blocks/cell/{n}"

        def gate(kind, s):
            parts = (
                self.linear(x, name(f"w_{kind}"), layer),
                self.linear(s, name(f"u_{kind}"), layer),
                self.vector(name(f"b_{kind}"), layer),
            )
            return [clip(sum(three)) for three in zip(*parts, strict=True)]

        f = gate("f", s)
        h = gate("h", [(f + 127) * s // 256 for f, s in zip(f, s, strict=True)])
        three = zip(f, h, s, strict=True)
        return [s + floor_divide((f + 127) * (h - s), 256) for f, h, s in three]

    def forward(self, tokens, state):
        """The logits of each token, and the states of the layers after the last."""
        state, logits = [list(s) for s in state], []
        for token in tokens:
            x = self.embed(int(token))
            for layer in range(self.cfg.layers):
                s = state[layer]
                if token == self.cfg.separator:
                    s = [0] * len(s)
                s = self.cell(self.norm(x, "blocks/norm_1", layer), s, layer)
                state[layer] = s
                x = [clip(a + b) for a, b in zip(x, s, strict=True)]
                y = self.norm(x, "blocks/norm_2", layer)
                y = self.linear(y, "blocks/up", layer)
                y = self.linear(y, "blocks/down", layer)
                x = [clip(a + b) for a, b in zip(x, y, strict=True)]
            logits.append(self.linear(self.norm(x, "norm"), "head"))
        return logits, state

    def segment_loss(self, tokens, state):
        logits, state = self.forward(tokens[:-1], state)
        total = 0
        for y, token, target in zip(logits, tokens[:-1], tokens[1:], strict=True):
            if token == target == self.cfg.separator:
                continue
            powers = sum(math.floor(16 * 2 ** ((z + 128) / 16)) for z in y)
            total += round(16 * math.log2(powers)) - 64 - (y[target] + 128)
        return total, state


def zeros(cfg):
    return [[0] * cfg.width for _ in range(cfg.layers)]
