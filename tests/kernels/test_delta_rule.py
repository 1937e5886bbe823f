"""What the delta rule has beyond the laws of every recurrence."""

import jax
import numpy as np
import pytest
from recurrence_law import assert_law, error, run
from recurrences import ONE_STEP, THREE_STEPS, TWO_STEPS, over_inputs

from pallas_kernels import delta_product, delta_rule

NEVER_FORGOTTEN = ("one_key", "three_keys", "twelve_keys", "reflections", "mixed_decay")


@pytest.mark.slow
@pytest.mark.parametrize("name", NEVER_FORGOTTEN)
def test_law_on_8192_tokens(name):
    inputs = ONE_STEP.draw(name, B=1, T=8192, H=1, K=16, V=16)
    want = ONE_STEP.oracle(**inputs)
    reference = run(ONE_STEP, inputs, "reference")
    assert_law(run(ONE_STEP, inputs, "xla"), reference, want)


@pytest.mark.parametrize("name", ("twelve_keys", "three_keys", "random"))
def test_recurrence_is_accurate_on_512_tokens(name):
    """What the law is measured by: below 1e-5 with three steps a token."""
    inputs = THREE_STEPS.draw(name, B=1, T=512)
    want = THREE_STEPS.oracle(**inputs)
    got = run(THREE_STEPS, inputs, "reference")
    assert max(error(got[t], want[t]) for t in ("o", "state")) < 1e-5


@pytest.mark.slow
@over_inputs(lambda op: op.hard, ONE_STEP, TWO_STEPS)
def test_law_on_wide_heads(op, name):
    inputs = op.draw(name, B=1, T=700, H=1, K=128, V=64)
    want = op.oracle(**inputs)
    assert_law(run(op, inputs, "xla"), run(op, inputs, "reference"), want)


def test_one_step_is_delta_rule():
    inputs = ONE_STEP.draw("random")
    q, k, v, beta, g = operands = [inputs[name] for name in ONE_STEP.operands]
    got = delta_rule(q, k[:, :, 0], v[:, :, 0], beta[:, :, 0], g)
    want = delta_product(*operands)
    jax.tree.map(np.testing.assert_array_equal, got, want)
