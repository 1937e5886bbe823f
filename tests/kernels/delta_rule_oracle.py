"""The delta rule and its gradients in float64, token by token, in numpy."""

import numpy as np


def delta_product(q, k, v, beta, g, initial_state, d_o, d_state, scale=None):
    """Return results and gradients by name: o, state, and d_ for every operand.

    Shapes as in `pallas_kernels.delta_product`. The gradients are those of
    sum(o * d_o) + sum(state * d_state), by the recurrence run backwards.
    """
    q, k, v, beta, S, d_o, dS = (
        np.asarray(x, np.float64) for x in (q, k, v, beta, initial_state, d_o, d_state)
    )
    decay = np.exp(np.zeros(q.shape[:3]) if g is None else np.asarray(g, np.float64))
    T, N = k.shape[1:3]
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    o = np.zeros(d_o.shape)
    before, inner, after = [], [], []
    for t in range(T):
        before.append(S)
        S = decay[:, t, :, None, None] * S
        steps = []
        for n in range(N):
            steps.append(S)
            error = v[:, t, n] - _read(S, k[:, t, n])
            S = S + beta[:, t, n, :, None, None] * _outer(k[:, t, n], error)
        inner.append(steps)
        after.append(S)
        o[:, t] = scale * _read(S, q[:, t])
    state = S

    dq, dk, dv, dbeta = (np.zeros(x.shape) for x in (q, k, v, beta))
    dg = np.zeros(decay.shape)
    for t in reversed(range(T)):
        dq[:, t] = scale * _read_t(after[t], d_o[:, t])
        dS = dS + scale * _outer(q[:, t], d_o[:, t])
        for n in reversed(range(N)):
            S, key, b = inner[t][n], k[:, t, n], beta[:, t, n, :, None]
            error = v[:, t, n] - _read(S, key)
            dbeta[:, t, n] = (_read_t(dS, error) * key).sum(-1)
            d_error = b * _read(dS, key)
            dv[:, t, n] = d_error
            dk[:, t, n] = b * _read_t(dS, error) - _read_t(S, d_error)
            dS = dS - _outer(key, d_error)
        dg[:, t] = decay[:, t] * (dS * before[t]).sum((-1, -2))
        dS = decay[:, t, :, None, None] * dS
    results = {"o": o, "state": state, "d_q": dq, "d_k": dk, "d_v": dv}
    results |= {"d_beta": dbeta, "d_initial_state": dS}
    return results if g is None else results | {"d_g": dg}


def _read(S, key):
    return np.matmul(key[..., None, :], S)[..., 0, :]


def _read_t(S, value):
    return np.matmul(S, value[..., None])[..., 0]


def _outer(key, value):
    return key[..., :, None] * value[..., None, :]
