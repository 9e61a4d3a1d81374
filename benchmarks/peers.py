"""Other people's selective scans, each used where it is installed: same inputs, same result, called as their users call them.

All take u, delta, z (batch, L, E), A (E, S), B, C (batch, L, S), D, delta_bias (E,) as ours do; layouts that a peer wants otherwise are made
outside of what is timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

Operands = dict[str, Tensor]


def peers(operands: Operands) -> tuple[dict[str, Callable[..., Tensor]], list[str]]:
    """name -> a function of ``operands`` by keyword, giving (batch, L, E), and, in words, which peers are absent.

    Those whose name begins with "transformers" or "mamba-ssm" are differentiable; the others run forward only, on a CPU, in float32.
    """
    found: dict[str, Callable[..., Tensor]] = {}
    absent: list[str] = []
    on_cpu = operands["u"].device.type == "cpu"
    if _installed("transformers", absent):
        found["transformers"] = _transformers()
        if operands["u"].dtype != torch.float32:
            absent.append("peer transformers, mambapy: its products mix dtypes, float32 only: left out")
        elif _installed("mambapy", absent):
            found["transformers, mambapy"] = _transformers(use_mambapy=True)
    if not on_cpu and _installed("mamba_ssm", absent):
        found["mamba-ssm"] = _mamba_ssm()
    if on_cpu and operands["u"].dtype == torch.float32:
        if _installed("jax", absent):
            found["jax.lax.scan"] = _jax(operands)
        if _installed("numba", absent):
            found["numba"] = _numba(operands)
    return found, absent


def _installed(package: str, absent: list[str]) -> bool:
    there = importlib.util.find_spec(package) is not None
    if not there:
        absent.append(f"peer {package} is not installed: left out")
    return there


def _transformers(**options: bool) -> Callable[..., Tensor]:
    """The path that Mamba models of transformers take where no kernel is found: a loop over tokens, or mambapy's parallel scan."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    plain = getattr(mamba_selective_scan, "__wrapped__", mamba_selective_scan)

    def run(u, delta, A, B, C, D, z, delta_bias):
        u, delta, B, C, z = (t.transpose(1, 2) for t in (u, delta, B, C, z))
        return plain(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True, **options).transpose(1, 2)

    return run


def _mamba_ssm() -> Callable[..., Tensor]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def run(u, delta, A, B, C, D, z, delta_bias):
        u, delta, B, C, z = (t.transpose(1, 2) for t in (u, delta, B, C, z))
        return selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True).transpose(1, 2)

    return run


def _jax(operands: Operands) -> Callable[..., Tensor]:
    """Jitted `jax.lax.scan` over tokens; the arrays are made once, outside of the timed call."""
    import jax
    import jax.numpy as jnp

    def scan(u, delta, A, B, C, D, z, delta_bias):
        delta = jax.nn.softplus(delta + delta_bias)

        def step(h, token):
            u, delta, B, C = token
            h = jnp.exp(delta[..., None] * A) * h + (delta * u)[..., None] * B[:, None]
            return h, (h * C[:, None]).sum(-1)

        first = jnp.zeros((u.shape[0], *A.shape), jnp.float32)
        _, y = jax.lax.scan(step, first, tuple(t.swapaxes(0, 1) for t in (u, delta, B, C)))
        return (y.swapaxes(0, 1) + D * u) * jax.nn.silu(z)

    arrays = {name: jnp.asarray(t.detach().numpy()) for name, t in operands.items()}
    jitted = jax.jit(scan)
    return lambda **_: torch.from_dlpack(jitted(**arrays).block_until_ready())


def _numba(operands: Operands) -> Callable[..., Tensor]:
    """Compiled loops, threads over channels, states of one channel in a small array."""
    import math

    import numba
    import numpy as np

    @numba.njit(parallel=True, fastmath=True)
    def scan(u, delta, A, B, C, D, z, delta_bias):
        batch, length, channels = u.shape
        states = A.shape[1]
        out = np.empty_like(u)
        for row in numba.prange(batch * channels):
            b, e = row // channels, row % channels
            h = np.zeros(states, np.float32)
            for t in range(length):
                raw = delta[b, t, e] + delta_bias[e]
                step = raw if raw > np.float32(20) else np.float32(math.log1p(math.exp(raw)))
                drive = step * u[b, t, e]
                y = np.float32(0)
                for s in range(states):
                    h[s] = np.float32(math.exp(step * A[e, s])) * h[s] + drive * B[b, t, s]
                    y += h[s] * C[b, t, s]
                gate = z[b, t, e]
                out[b, t, e] = (y + D[e] * u[b, t, e]) * gate / (np.float32(1) + np.float32(math.exp(-gate)))
        return out

    arrays = {name: t.detach().numpy() for name, t in operands.items()}
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    return lambda **_: torch.from_numpy(scan(*(arrays[name] for name in order)))
