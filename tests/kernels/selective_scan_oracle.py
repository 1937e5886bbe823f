"""The selective scan and its gradients in float64, token by token, in numpy."""

import numpy as np

OPERANDS = ("x", "dt", "A", "B", "C", "D", "initial_state")
WEIGHTS = ("A", "D")  # the same at every token


def selective_scan(x, dt, A, B, C, D, initial_state, d_y, d_state):
    """Return results and gradients by name: y, state, and d_ for every operand.

    Shapes as in `pallas_kernels.selective_scan`. The gradients are those of
    sum(y * d_y) + sum(state * d_state), by the recurrence run backwards.
    """
    x, dt, A, B, C, D, h, d_y, dh = (
        np.asarray(a, np.float64)
        for a in (x, dt, A, B, C, D, initial_state, d_y, d_state)
    )
    T = x.shape[1]
    before, after = [], []
    y = np.zeros(x.shape)
    for t in range(T):
        before.append(h)
        h = np.exp(dt[:, t, :, None] * A) * h
        h = h + dt[:, t, :, None] * x[:, t, :, None] * B[:, t, None, :]
        after.append(h)
        y[:, t] = (h * C[:, t, None, :]).sum(-1) + D * x[:, t]
    state = h

    dx, ddt, dA, dB, dC = (np.zeros(a.shape) for a in (x, dt, A, B, C))
    for t in reversed(range(T)):
        dC[:, t] = (after[t] * d_y[:, t, :, None]).sum(1)
        dh = dh + d_y[:, t, :, None] * C[:, t, None, :]
        read = (dh * B[:, t, None, :]).sum(-1)
        dx[:, t] = read * dt[:, t] + D * d_y[:, t]
        dB[:, t] = (dh * (dt[:, t] * x[:, t])[..., None]).sum(1)
        dh = dh * np.exp(dt[:, t, :, None] * A)
        d_exponent = dh * before[t]
        ddt[:, t] = read * x[:, t] + (d_exponent * A).sum(-1)
        dA += (d_exponent * dt[:, t, :, None]).sum(0)
    dD = (d_y * x).sum((0, 1))
    gradients = dict(zip(OPERANDS, (dx, ddt, dA, dB, dC, dD, dh), strict=True))
    return {"y": y, "state": state} | {f"d_{n}": g for n, g in gradients.items()}


def segmented(inputs, segment_ids):
    """Apply `selective_scan` to each segment separately; ids < 0 are padding."""
    results = _zeros(inputs)
    for b, ids in enumerate(segment_ids):
        tokens = np.flatnonzero(ids >= 0)
        starts = np.flatnonzero(np.diff(ids[tokens])) + 1
        runs = np.split(tokens, starts)
        for r, run in enumerate(runs):
            part = {
                name: _part(name, a, slice(b, b + 1), slice(b, b + 1), run)
                for name, a in inputs.items()
            }
            if r > 0:
                part["initial_state"] = 0 * part["initial_state"]
            if r < len(runs) - 1:
                part["d_state"] = 0 * part["d_state"]
            for name, a in selective_scan(**part).items():
                if name.removeprefix("d_") in WEIGHTS:
                    results[name] += a
                elif name == "d_initial_state":
                    results[name][b] = a[0] if r == 0 else results[name][b]
                elif name == "state":
                    results[name][b] = a[0]  # the last run's is kept
                else:
                    results[name][b, run] = a[0]
    return results


def ragged(inputs, cu_seqlens):
    """Apply `selective_scan` to each sequence of the only row, with its own states."""
    results = _zeros(inputs)
    for s, (start, end) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)):
        part = {
            name: _part(name, a, slice(s, s + 1), slice(0, 1), slice(start, end))
            for name, a in inputs.items()
        }
        for name, a in selective_scan(**part).items():
            if name.removeprefix("d_") in WEIGHTS:
                results[name] += a
            elif name.endswith("state"):
                results[name][s] = a[0]
            else:
                results[name][:, start:end] = a
    return results


def _part(name, a, states, rows, tokens):
    if name in WEIGHTS:
        return a
    return a[states] if name.endswith("state") else a[rows, tokens]


def _zeros(inputs):
    zeros = {f"d_{name}": np.zeros(inputs[name].shape) for name in OPERANDS}
    return zeros | {
        "y": np.zeros(inputs["d_y"].shape),
        "state": np.zeros(inputs["d_state"].shape),
    }
