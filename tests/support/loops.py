"""The operations once more, as loops over tokens in NumPy float64, written from docs/spec.md
without looking at `reference/`.
"""

import math

import numpy as np


def softplus(value: float) -> float:
    return value if value > 20 else math.log1p(math.exp(value))


def silu(value):
    return value / (1 + np.exp(-value))


def scan_one(u, delta, A, B, C, D, bias, *, use_softplus, reverse, state):
    """One sequence: u, delta (L, E); A (E, S); B, C (L, G, S) -> y (L, E), state (E, S)."""
    length, channels = u.shape
    per_group = channels // B.shape[1]
    y = np.zeros_like(u)
    state = state.copy()
    for t in range(length - 1, -1, -1) if reverse else range(length):
        for e in range(channels):
            step = delta[t, e] + (0.0 if bias is None else bias[e])
            step = softplus(step) if use_softplus else step
            g = e // per_group
            for s in range(A.shape[1]):
                state[e, s] = math.exp(step * A[e, s]) * state[e, s] + step * u[t, e] * B[t, g, s]
                y[t, e] += state[e, s] * C[t, g, s]
            if D is not None:
                y[t, e] += D[e] * u[t, e]
    return y, state


def scan(direction, *, use_softplus, reverse=False, initial=None, bounds=None):
    """(batch, L, E) or, with bounds, packed sequences in a batch of one -> y, states (n, E, S)."""
    u, delta, A, B, C, D, bias = direction
    pieces = (
        [(b, 0, u.shape[1]) for b in range(u.shape[0])]
        if bounds is None
        else [(0, *pair) for pair in zip(bounds, bounds[1:], strict=False)]
    )
    y, states = np.zeros_like(u), []
    for i, (b, start, end) in enumerate(pieces):
        part = slice(start, end)
        first = np.zeros_like(A) if initial is None else initial[i]
        options = {"use_softplus": use_softplus, "reverse": reverse, "state": first}
        y[b, part], state = scan_one(u[b, part], delta[b, part], A, B[b, part], C[b, part], D, bias, **options)
        states.append(state)
    return y, np.stack(states)


def conv(x, weight, bias, *, use_silu, reverse=False, initial=None, bounds=None):
    """(batch, L, E) with weight (E, K); a token meets itself and the K-1 before it in scan order."""
    taps = weight.shape[1]
    pieces = (
        [(b, 0, x.shape[1]) for b in range(x.shape[0])]
        if bounds is None
        else [(0, *pair) for pair in zip(bounds, bounds[1:], strict=False)]
    )
    out = np.zeros_like(x)
    for i, (b, start, end) in enumerate(pieces):
        order = list(range(start, end))[::-1] if reverse else list(range(start, end))
        for position, t in enumerate(order):
            for k in range(taps):
                back = position - (taps - 1 - k)
                if back >= 0:
                    out[b, t] += weight[:, k] * x[b, order[back]]
                elif initial is not None:
                    out[b, t] += weight[:, k] * initial[i, :, taps - 1 + back]
            if bias is not None:
                out[b, t] += bias
    return silu(out) if use_silu else out


def reduce(x, grid, reduction):
    """(batch, T*H*W, C) -> the survivors, block by block."""
    k, p, s = reduction
    frames, height, width = grid
    video = x.reshape(x.shape[0], frames, height, width, x.shape[2])
    rows = []
    for t in range(0, frames, k * s):
        for i in range(0, height, p):
            for j in range(0, width, p):
                rows.append(video[:, t : t + k, i : i + p, j : j + p].mean((1, 2, 3)))
    return np.stack(rows, 1)
