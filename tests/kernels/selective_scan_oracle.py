"""The selective scan and its gradients in float64, token by token, in numpy."""

import numpy as np

OPERANDS = ("x", "dt", "A", "B", "C", "D", "initial_state")


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
