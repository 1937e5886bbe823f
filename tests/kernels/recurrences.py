"""The recurrences as their laws see them: a record of each operation and variant."""

import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pytest
from delta_rule_oracle import delta_product as delta_rule_oracle
from jax.sharding import PartitionSpec as P
from linear_attention_oracle import gated_linear_attention as linear_attention_oracle
from selective_scan_oracle import selective_scan as selective_scan_oracle

import pallas_kernels
from benchmarks.cases import delta_rule, linear_attention, selective_scan


class Recurrence(NamedTuple):
    """An operation in one of its variants.

    Attributes:
        name: what the tests' names call it.
        call: the public function.
        oracle: from inputs to results and gradients, in float64.
        draw: from the name of a hard input, and the sizes that are not those of a
          small shape (no multiple of any block size), to inputs.
        tpu: the sizes that its TPU kernel is tested at.
        operands: the arguments, but for the state.
        weights: those that are the same for all rows and tokens.
        narrow: those that may be bfloat16 while the rest is float32.
        output: the result beside the state; it has the dtype of the operand `typed_by`.
        typed_by: see `output`.
        divided: how the operands and results lie on a mesh of rows and heads.
        steps: roundings of a state a token.
        hard: the names of all hard inputs; those without a decay only once.
        exact: those compared in float64.
        streamed: those divided into segments and sequences.
        bitwise: those whose bits are compared; the first has a decay.
        usual: one with a decay, for laws of one input.
    """

    name: str
    call: Callable
    oracle: Callable
    draw: Callable[..., dict[str, np.ndarray | None]]
    tpu: dict[str, int]
    operands: tuple[str, ...]
    narrow: tuple[str, ...]
    output: str
    typed_by: str
    divided: Mapping[str, P]
    hard: tuple[str, ...]
    exact: tuple[str, ...] = ()
    streamed: tuple[str, ...] = ()
    bitwise: tuple[str, ...] = ()
    usual: str = ""
    weights: tuple[str, ...] = ()
    steps: int = 1

    def __repr__(self):
        return self.name

    @property
    def tokens(self) -> tuple[str, ...]:
        """The operands with a row and a time."""
        return tuple(name for name in self.operands if name not in self.weights)

    @property
    def over_time(self) -> tuple[str, ...]:
        """The output and the gradients that have a row and a time."""
        return (self.output, *(f"d_{name}" for name in self.tokens))

    def axes(self, name: str, count: int) -> str:
        """The axes of an operand or of the output, a letter each."""
        module = sys.modules[self.call.__module__]
        known = module.AXES | {"o": "BTHV", "y": "BTE"}
        return known[name] if len(known[name]) == count else module.CHANNEL_AXES[name]

    def cut(self, arrays, tokens: slice):
        """Copies of inputs or results, with some of their tokens."""
        timed = (*self.tokens, self.output)
        return {
            name: (x[:, tokens] if name.removeprefix("d_") in timed else x).copy()
            for name, x in arrays.items()
            if x is not None
        }


STATE = P("data", "tensor")


def _delta_rule(steps: int, **names) -> Recurrence:
    token, key = P("data", None, "tensor"), P("data", None, None, "tensor")
    small = delta_rule.SHAPES["small"]._replace(N=steps)
    return Recurrence(
        name=f"delta_rule-{steps}",
        call=pallas_kernels.delta_product,
        oracle=delta_rule_oracle,
        draw=lambda name, **sizes: delta_rule.draw(name, small._replace(**sizes)),
        tpu={"B": 1, "T": 200, "H": 3, "K": 64, "V": 64},
        operands=("q", "k", "v", "beta", "g"),
        narrow=("q", "k", "v"),
        output="o",
        typed_by="v",
        divided={"q": token, "k": key, "v": key, "beta": key, "g": token, "o": token}
        | {"initial_state": STATE, "state": STATE},
        steps=steps,
        hard=tuple(delta_rule.HARD),
        usual="twelve_keys_gated",
        **names,
    )


def _linear_attention(decay: str, **names) -> Recurrence:
    small = linear_attention.SHAPES["small"]

    def draw(name, **sizes):
        return linear_attention.draw(name, small._replace(**sizes), decay)

    token = P("data", None, "tensor")
    return Recurrence(
        name=f"linear_attention-{decay}",
        call=pallas_kernels.gated_linear_attention,
        oracle=linear_attention_oracle,
        draw=draw,
        tpu={"B": 1, "T": 200, "H": 2, "K": 64, "V": 64},
        operands=("q", "k", "v", "g"),
        narrow=("q", "k", "v"),
        output="o",
        typed_by="v",
        divided=dict.fromkeys("qkvgo", token)
        | {"initial_state": STATE, "state": STATE},
        hard=tuple(
            name
            for name, hard in linear_attention.HARD.items()
            if decay == "scalar" or hard.g is not None
        ),
        exact=("gate", "resets", "mixed_decay"),
        bitwise=("gate",),
        usual="mixed_decay",
        **names,
    )


ONE_STEP = _delta_rule(
    1,
    exact=("random", "twelve_keys", "mixed_decay"),
    streamed=("twelve_keys", "mixed_decay"),
    bitwise=("twelve_keys_gated", "random"),
)
TWO_STEPS = _delta_rule(
    2,
    streamed=("twelve_keys", "mixed_decay"),
    bitwise=("twelve_keys_gated", "twelve_keys"),
)
THREE_STEPS = _delta_rule(3, exact=ONE_STEP.exact)
A_HEAD = _linear_attention(
    "scalar", streamed=("gate", "mixed_decay", "resets", "no_decay")
)
A_CHANNEL = _linear_attention("channel", streamed=("gate", "mixed_decay", "resets"))
SCAN = Recurrence(
    name="selective_scan",
    call=pallas_kernels.selective_scan,
    oracle=selective_scan_oracle,
    draw=lambda name, **sizes: selective_scan.draw(
        name, selective_scan.SHAPES["small"]._replace(**sizes)
    ),
    tpu={"B": 1, "T": 150, "E": 128, "N": 8},
    operands=("x", "dt", "A", "B", "C", "D"),
    weights=("A", "D"),
    narrow=("x", "B", "C"),
    output="y",
    typed_by="x",
    divided=dict.fromkeys(("x", "dt", "y"), P("data", None, "tensor"))
    | dict.fromkeys(("A", "D"), P("tensor"))
    | {"B": P("data"), "C": P("data"), "initial_state": STATE, "state": STATE},
    hard=tuple(selective_scan.HARD),
    exact=tuple(selective_scan.HARD),
    streamed=("random", "no_decay_repeated", "mixed"),
    bitwise=("random",),
    usual="mixed",
)

DELTA_RULES = (ONE_STEP, TWO_STEPS, THREE_STEPS)
RECURRENCES = (*DELTA_RULES, A_HEAD, A_CHANNEL, SCAN)
FORMS = ("xla", "reference")

# Row 0: padding in front, behind and inside a segment, segments of length 1, an id
# that comes back. Row 1: one long segment over several chunks.
SEGMENTS = np.full((2, 150), 4)
SEGMENTS[0] = np.repeat(
    [-1, 7, 2, 5, -1, 5, -2, 2, 3, -1], [3, 40, 1, 1, 2, 50, 1, 20, 29, 3]
)


def over(*ops: Recurrence):
    """A law of these operations."""
    return pytest.mark.parametrize("op", ops, ids=str)


def over_inputs(
    of: Callable[[Recurrence], tuple[str, ...]], *ops: Recurrence, quick=()
):
    """A law of some named inputs of these operations, or of all of them.

    Args:
        quick: the inputs whose tests are not slow; all if empty.
    """
    cases = [
        pytest.param(
            op,
            name,
            id=f"{op}-{name}",
            marks=[pytest.mark.slow] if quick and name not in quick else [],
        )
        for op in ops or RECURRENCES
        for name in of(op)
    ]
    return pytest.mark.parametrize(("op", "name"), cases)


over_forms = pytest.mark.parametrize("form", FORMS)
