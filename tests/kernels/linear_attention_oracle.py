"""Gated linear attention and its gradients in float64, token by token, in numpy."""

import numpy as np


def gated_linear_attention(q, k, v, g, initial_state, d_o, d_state, scale=None):
    """Return results and gradients by name: o, state, and d_ for every operand.

    Shapes as in `pallas_kernels.gated_linear_attention`. The gradients are those of
    sum(o * d_o) + sum(state * d_state), by the recurrence run backwards.
    """
    q, k, v, S, d_o, dS = (
        np.asarray(x, np.float64) for x in (q, k, v, initial_state, d_o, d_state)
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    log_decay = np.zeros(q.shape[:3]) if g is None else np.asarray(g, np.float64)
    a_channel = log_decay.ndim == 4
    decay = np.exp(
        log_decay if a_channel else log_decay[..., None]
    )  # [B, T, H, K or 1]

    states, o = [S], np.zeros(d_o.shape)
    for t in range(q.shape[1]):
        S = decay[:, t, :, :, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        states.append(S)
        o[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], S)
    results = {"o": o, "state": S}

    dq, dk, dv, dg = (np.zeros(x.shape) for x in (q, k, v, q))
    for t in reversed(range(q.shape[1])):
        dq[:, t] = scale * np.einsum("bhv,bhkv->bhk", d_o[:, t], states[t + 1])
        dS = dS + scale * q[:, t, :, :, None] * d_o[:, t, :, None, :]
        dk[:, t] = np.einsum("bhv,bhkv->bhk", v[:, t], dS)
        dv[:, t] = np.einsum("bhk,bhkv->bhv", k[:, t], dS)
        dg[:, t] = decay[:, t] * (dS * states[t]).sum(-1)
        dS = decay[:, t, :, :, None] * dS
    results |= {"d_q": dq, "d_k": dk, "d_v": dv, "d_initial_state": dS}
    if g is None:
        return results
    return results | {"d_g": dg if a_channel else dg.sum(-1)}
