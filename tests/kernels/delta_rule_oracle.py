"""The delta rule and its gradients in float64, token by token, in numpy."""

import numpy as np

OPERANDS = ("q", "k", "v", "beta", "g", "initial_state")


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


def segmented(inputs, segment_ids, oracle=delta_product):
    """Apply `oracle` to each segment separately; ids < 0 are padding."""
    results = {}
    for b, ids in enumerate(segment_ids):
        tokens = np.flatnonzero(ids >= 0)
        starts = np.flatnonzero(np.diff(ids[tokens])) + 1
        runs = np.split(tokens, starts)
        for r, run in enumerate(runs):
            part = {
                name: x[b : b + 1] if name.endswith("state") else x[b : b + 1, run]
                for name, x in inputs.items()
                if x is not None
            }
            part.setdefault("g", None)
            if r > 0:
                part["initial_state"] = 0 * part["initial_state"]
            if r < len(runs) - 1:
                part["d_state"] = 0 * part["d_state"]
            for name, x in oracle(**part).items():
                if name.endswith("state"):
                    chosen = r == (0 if name == "d_initial_state" else len(runs) - 1)
                    whole = results.setdefault(name, np.zeros(inputs["d_state"].shape))
                    if chosen:
                        whole[b] = x[0]
                else:
                    shape = inputs["d_o" if name == "o" else name[2:]].shape
                    results.setdefault(name, np.zeros(shape))[b, run] = x[0]
    return results


def ragged(inputs, cu_seqlens, oracle=delta_product):
    """Apply `oracle` to each sequence of the only row, with its own states."""
    results = {}
    for s, (start, end) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)):
        part = {
            name: x[s : s + 1] if name.endswith("state") else x[:, start:end]
            for name, x in inputs.items()
            if x is not None
        }
        part.setdefault("g", None)
        for name, x in oracle(**part).items():
            if name.endswith("state"):
                shape = inputs["d_state"].shape
                results.setdefault(name, np.zeros(shape))[s] = x[0]
            else:
                shape = inputs["d_o" if name == "o" else name[2:]].shape
                results.setdefault(name, np.zeros(shape))[:, start:end] = x
    return results
