"""Paged attention in float64 numpy, one query and head at a time, by the definition."""

import numpy as np


def paged_attention(
    q,
    k_pages,
    v_pages,
    page_table,
    kv_lens,
    cu_q_lens,
    scale=None,
    window=None,
    soft_cap=None,
    k_scale=None,
    v_scale=None,
):
    """Return the output [Tq, Hq, D] and log-sum-exp [Tq, Hq]."""
    q = np.asarray(q, np.float64)
    tokens, heads, D = q.shape
    page, kv_heads = k_pages.shape[1:3]
    scale = D**-0.5 if scale is None else scale
    o, lse = np.zeros(q.shape), np.full((tokens, heads), -np.inf)

    def value(pages, scales, place, head):
        x = np.asarray(pages[place][head], np.float64)
        if scales is None or np.ndim(scales) == 0:
            return x * (1.0 if scales is None else float(scales))
        return x * float(scales[place][head])

    for s, length in enumerate(kv_lens):
        q_len = cu_q_lens[s + 1] - cu_q_lens[s]
        for i in range(q_len):
            t, position = cu_q_lens[s] + i, length - q_len + i
            oldest = 0 if window is None else max(0, position - window + 1)
            places = [
                (page_table[s][j // page], j % page)
                for j in range(oldest, position + 1)
            ]
            if not places:
                continue
            for h in range(heads):
                shared = h // (heads // kv_heads)
                k = np.stack([value(k_pages, k_scale, at, shared) for at in places])
                v = np.stack([value(v_pages, v_scale, at, shared) for at in places])
                scores = scale * (k @ q[t, h])
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                weights = np.exp(scores - scores.max())
                o[t, h] = weights @ v / weights.sum()
                lse[t, h] = scores.max() + np.log(weights.sum())
    return o, lse
