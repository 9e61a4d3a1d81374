"""Other people's selective scans, each used where it is installed: same inputs, same result, called
as their users call them.

All take u, delta, z (batch, L, E), A (E, S), B, C (batch, L, S), D, delta_bias (E,) as ours do;
layouts that a peer wants otherwise are made outside of what is timed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from storm_kernels import reference

Operands = dict[str, Tensor]

# Tokens in a graph of the compiled reference. It has a node for each token and operation: whole
# sequences would be compiled for hours.
COMPILED_TOKENS = 32


@dataclass(frozen=True)
class Contender:
    """``call(**inputs)`` gives (batch, L', E); it is differentiable to all of ``inputs`` unless it
    runs ``forward_only``.
    """

    call: Callable[..., Tensor]
    inputs: Operands
    forward_only: bool = False


def peers(given: Operands, loops: bool) -> tuple[dict[str, Contender], list[str]]:
    """name -> one direction's scan of ``given`` with its gate, and, in words, which peers are
    absent. ``loops``: those that loop over tokens, too.
    """
    found: dict[str, Contender] = {}
    absent: list[str] = []
    on_cpu, in_float32 = given["u"].device.type == "cpu", given["u"].dtype == torch.float32
    if loops and not on_cpu:
        found["torch.compile"] = compiled_reference(given)
    if loops and (plain := _transformers_scan(absent)):
        found["transformers"] = _transformers(given, plain)
        if not in_float32:
            absent.append("peer transformers, mambapy: its products mix dtypes, float32 only: left out")
        elif _installed("mambapy", absent):
            found["transformers, mambapy"] = _transformers(given, plain, use_mambapy=True)
    selective_scan_fn = _selective_scan_fn(given, absent)
    if selective_scan_fn:
        found["mamba-ssm"] = mamba_ssm(given, selective_scan_fn)
    if loops and on_cpu and in_float32:
        if _installed("jax", absent):
            found["jax.lax.scan"] = Contender(_jax(given), {}, forward_only=True)
        if _installed("numba", absent):
            found["numba"] = Contender(_numba(given), {}, forward_only=True)
    return found, absent


def bidirectional_peers(
    given: Operands, loops: bool, reduce: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Contender], list[str]]:
    """As `peers`, of both directions with the same operands, gated, and ``reduce``d from (batch, L,
    E) to (batch, L', E).
    """
    found: dict[str, Contender] = {}
    absent: list[str] = []
    if loops and given["u"].device.type != "cpu":
        found["torch.compile"] = compiled_reference(given, both=True, reduce=reduce)
    selective_scan_fn = _selective_scan_fn(given, absent)
    if selective_scan_fn:
        found["mamba-ssm as in Vim"] = mamba_ssm_as_in_vim(given, selective_scan_fn, reduce)
    return found, absent


def _installed(package: str, absent: list[str]) -> bool:
    there = importlib.util.find_spec(package) is not None
    if not there:
        absent.append(f"peer {package} is not installed: left out")
    return there


def _selective_scan_fn(given: Operands, absent: list[str]) -> Callable | None:
    """mamba-ssm's CUDA scan, or None with the reason."""
    if given["u"].device.type == "cpu":
        absent.append("peer mamba-ssm runs on a GPU only: left out")
    elif importlib.util.find_spec("mamba_ssm") is None:
        absent.append("peer mamba-ssm is not installed: left out; `make gpu-peers` builds it for this GPU")
    else:
        try:
            from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        except ImportError as error:
            absent.append(
                f"peer mamba-ssm is installed but cannot be imported ({error}): left out; "
                "`make gpu-peers` builds it for this GPU"
            )
        else:
            return selective_scan_fn
    return None


def compiled_reference(
    given: Operands, both: bool = False, reduce: Callable[[Tensor], Tensor] = lambda out: out
) -> Contender:
    """The reference under torch.compile, COMPILED_TOKENS tokens at a time, the state handed on."""
    scan = torch.compile(reference.selective_scan, dynamic=False)
    finish = torch.compile(lambda y, z: reduce(y * F.silu(z)), dynamic=False)

    def one_way(reverse: bool, u, delta, A, B, C, D, delta_bias):
        learns = torch.is_grad_enabled() and u.requires_grad  # so that the first tile needs no graph of its own
        state = torch.zeros(u.shape[0], *A.shape, device=u.device, requires_grad=learns)
        starts = list(range(0, u.shape[1], COMPILED_TOKENS))
        outs = {}
        for start in reversed(starts) if reverse else starts:
            tile = slice(start, start + COMPILED_TOKENS)
            outs[start], state = scan(
                u[:, tile], delta[:, tile], A, B[:, tile], C[:, tile], D, None, delta_bias,
                delta_softplus=True, reverse=reverse, initial_state=state, return_final_state=True,
            )  # fmt: skip
        return torch.cat([outs[start] for start in starts], 1)

    def run(z, **operands):
        y = one_way(False, **operands)
        return finish(y + one_way(True, **operands) if both else y, z)

    return Contender(run, given)


def _transformers_scan(absent: list[str]) -> Callable | None:
    """The path that Mamba models of transformers take where no kernel is found, or None with the reason."""
    if not _installed("transformers", absent):
        return None
    try:
        from transformers.models.mamba.modeling_mamba import mamba_selective_scan
    except ImportError:  # in older ones it is a part of the mixer's forward
        absent.append(
            f"peer transformers {importlib.metadata.version('transformers')} has no scan apart from its mixers: "
            "left out"
        )
        return None
    return getattr(mamba_selective_scan, "__wrapped__", mamba_selective_scan)


def _transformers(given: Operands, plain: Callable, **options: bool) -> Contender:
    """transformers' ``plain`` scan: a loop over tokens or, with ``use_mambapy``, mambapy's parallel scan."""

    def run(u, delta, A, B, C, D, z, delta_bias):
        return plain(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True, **options).transpose(1, 2)

    return Contender(run, _channels_first(given))


def mamba_ssm(given: Operands, selective_scan_fn: Callable[..., Tensor]) -> Contender:
    """mamba-ssm's ``selective_scan_fn``, whose layout is (batch, E, L)."""

    def run(u, delta, A, B, C, D, z, delta_bias):
        return selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True).transpose(1, 2)

    return Contender(run, _channels_first(given))


def mamba_ssm_as_in_vim(
    given: Operands, selective_scan_fn: Callable[..., Tensor], reduce: Callable[[Tensor], Tensor]
) -> Contender:
    """Both directions as Vim has them from mamba-ssm: x and z flipped, scanned and gated apart, the
    second flipped back, added.

    Vim computes the second direction's delta, B and C from the flipped x: they are flipped outside
    of what is timed.
    """
    first = _channels_first(given)
    flipped = {f"{name}_b": first[name].flip(-1) for name in ("delta", "B", "C")}

    def run(u, delta, A, B, C, D, z, delta_bias, delta_b, B_b, C_b):
        forward = selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True)
        backward = selective_scan_fn(u.flip(-1), delta_b, A, B_b, C_b, D, z.flip(-1), delta_bias, delta_softplus=True)
        return reduce((forward + backward.flip(-1)).transpose(1, 2))

    return Contender(run, first | flipped)


def _channels_first(given: Operands) -> Operands:
    """(batch, L, E or S) -> (batch, E or S, L), in memory too; the rest as it is."""
    return {name: t.transpose(1, 2).contiguous() if t.dim() == 3 else t for name, t in given.items()}


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
