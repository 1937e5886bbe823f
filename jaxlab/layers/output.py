"""The output projection of a recurrent layer, from its heads to the model's width."""

from typing import Any

import jax
from jaxtyping import Array, Float

from jaxlab.layers.norm import rms_norm
from jaxlab.params import linear, value


def gated_output(
    params: Any, x: Float[Array, "*rows width"], o: Float[Array, "*rows H V"]
) -> Float[Array, "*rows width"]:
    """Return ``(rms_norm(o) * silu(x W_gate)) W_o``.

    Each head is normalised by itself; without `w_gate` in `params` there is no gate.
    """
    o = rms_norm(o, value(params["norm"])).reshape(*x.shape[:-1], -1)
    if "w_gate" in params:
        o = o * jax.nn.silu(linear(x, params["w_gate"]))
    return linear(o, params["w_o"])
