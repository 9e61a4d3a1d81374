"""The Mamba, FalconMamba, Jamba and Zamba mixers of transformers on our kernels: prefill, cached
decoding and training, in two forms.

Same results as the plain PyTorch path of the form that a module comes from:

- old (up to 5.15, with a ``slow_forward``): padding is masked after in_proj, the bias of dt_proj
  belongs to dt_proj, a carried state continues; dt_proj and act are called as modules, conv1d too
  but for the steps of decoding;
- present (from 5.16): padding is masked before in_proj, the bias of dt_proj is added in float32,
  and several tokens after a cached prefix start from a zero state (as transformers' own fallback
  does); one token continues the state. The weights of conv1d and dt_proj are used without calling
  the modules, the activation is a function.

A module is called where the original calls it and it is more than its weights
(:mod:`storm_kernels.plain`); where the original takes the weights, so does this, and lets
accelerate bring offloaded ones first. Zamba's mixers work by head, each with a part of the channels
and with B and C of its own. Nothing here imports transformers. Symbols: b batch, l tokens, d
channels, n states, w taps, r rank of dt, h heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..nn.core import operands, scan
from ..nn.linear import convolve, linear, project
from ..plain import is_plain_convolution, is_silu
from ..reference import Direction
from .transformers_cache import Past, past

_Result = TypeVar("_Result")


def mixer_forward(
    mixer: nn.Module,
    hidden_states: Tensor,
    cache=None,
    attention_mask: Tensor | None = None,
    cache_position: Tensor | None = None,
    *,
    old: bool,
) -> Tensor:
    """What the mixer's own forward computes: hidden_states (b, l, d_model) -> the same shape;
    ``cache``, where given, is updated in place.

    ``attention_mask`` (b, l): zero where a token is padding. ``old``: which of the two forms.
    """
    dtype, length = hidden_states.dtype, hidden_states.shape[1]
    before = None if cache is None else past(mixer, cache, length, old, cache_position)
    mask = _mask(mixer, attention_mask, length, before)
    if not old:
        hidden_states = _masked(hidden_states, mask)
    x, z = _halves(mixer, project(hidden_states, mixer.in_proj))
    if old:
        x = _masked(x, mask)
    history, state = (None, None) if before is None else before.read()
    u = _convolve(mixer, x, history, old)
    if before is not None:
        before.keep_inputs(x)
    u = _masked(u, mask)
    direction = _operands_by_head(mixer, u, old) if by_head(mixer) else _operands(mixer, u, old)
    act = mixer.act if old and not _is_silu(mixer) else None
    y = scan([direction], None if act else z, initial_state=state, return_final_state=before is not None)
    if before is not None:
        y, state = y
        before.keep_state(state)
    if act:
        y = y * _gate(mixer, z)
    return project(y.to(dtype), mixer.out_proj)


def by_head(mixer: nn.Module) -> bool:
    """Whether the mixer is Zamba's: x_proj and dt_proj are bare weights, with a part for each head."""
    return hasattr(mixer, "x_proj_weight")


def not_fused(mixer: nn.Module, old: bool) -> str:
    """What of the mixer runs as PyTorch modules beside the kernels, for the report; empty if the kernels do it all."""
    notes = []
    if old and not is_plain_convolution(mixer.conv1d):
        notes.append("conv1d is more than its weights and is called: PyTorch's convolution")
    if old and not _is_silu(mixer):
        notes.append("act is called: a pass of its own after the convolution and after the scan")
    elif not old and not _names_silu(mixer):
        notes.append(f"the activation {mixer.activation!r} is a pass of its own after the convolution")
    return "; ".join(notes)


def _mask(mixer: nn.Module, attention_mask: Tensor | None, length: int, before: Past | None) -> Tensor | None:
    """The mask as (b, l, 1)."""
    if attention_mask is None:
        return None
    if by_head(mixer) and hasattr(mixer, "slow_forward"):
        # The mask of the whole sequence comes along with its last tokens.
        if before is not None and before.started and length == 1:
            return None
        attention_mask = attention_mask[:, -length:]
    return attention_mask.unsqueeze(-1)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else (x * mask).to(x.dtype)


def _halves(mixer: nn.Module, projected: Tensor) -> tuple[Tensor, Tensor]:
    """The scan's input and the gate (b, l, d); Zamba's in_proj has them alternate."""
    return projected.unflatten(-1, (-1, 2)).unbind(-1) if by_head(mixer) else projected.chunk(2, dim=-1)


def _convolve(mixer: nn.Module, x: Tensor, history: Tensor | None, old: bool) -> Tensor:
    """x (b, l, d), convolved and activated."""
    if old and history is None:
        return convolve(x, mixer.conv1d, getattr(mixer, "act", None))
    silu = _is_silu(mixer) if old else _names_silu(mixer)

    def run(conv: nn.Module) -> Tensor:
        return ops.causal_conv1d(
            x, conv.weight.squeeze(1), conv.bias, activation="silu" if silu else None, initial_state=history
        )

    u = _with_weights(mixer.conv1d, run)
    if silu:
        return u
    if not old:  # the activation is looked up by name: no hook on mixer.act has a part in it
        return type(mixer.act).forward(mixer.act, u)
    return mixer.act(u[:, 0]).unsqueeze(1) if u.shape[1] == 1 else mixer.act(u.transpose(1, 2)).transpose(1, 2)


def _gate(mixer: nn.Module, z: Tensor) -> Tensor:
    """``act`` of z (b, l, d), called on the layout that the old form calls it with: (b, d, l), or
    by head (h, b, d / h, l).
    """
    if not by_head(mixer):
        return mixer.act(z.transpose(1, 2)).transpose(1, 2)
    return mixer.act(z.unflatten(-1, (mixer.A_log.shape[0], -1)).permute(2, 0, 3, 1)).permute(1, 3, 0, 2).flatten(2)


def _names_silu(mixer: nn.Module) -> bool:
    return getattr(mixer, "activation", "silu") in ("silu", "swish")


def _is_silu(mixer: nn.Module) -> bool:
    """Whether calling ``mixer.act`` is SiLU and nothing else."""
    return is_silu(getattr(mixer, "act", None))


def _with_weights(module: nn.Module, function: Callable[[nn.Module], _Result]) -> _Result:
    """``function(module)``, while the weights that accelerate keeps elsewhere are here: it brings
    them when a module is called, which this is not.
    """
    hook = vars(module).get("_hf_hook")
    if hook is None:
        return function(module)
    hook.pre_forward(module)
    try:
        return function(module)
    finally:
        hook.post_forward(module, ())


def _operands(mixer: nn.Module, u: Tensor, old: bool) -> Direction:
    A = -torch.exp(mixer.A_log.float())
    return operands(
        u, mixer.x_proj, mixer.dt_proj, A, mixer.D, norms=_norms(mixer), project_dt=partial(_project_dt, mixer, old)
    )


def _norms(mixer: nn.Module) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None:
    """What normalises dt_raw, B and C, if anything does."""
    if hasattr(mixer, "dt_layernorm"):  # Jamba, and FalconMamba from 5.16
        return lambda dt_raw, B, C: (mixer.dt_layernorm(dt_raw), mixer.b_layernorm(B), mixer.c_layernorm(C))
    if hasattr(mixer, "rms_eps"):  # FalconMamba before: norms without weights
        return lambda *rows: tuple(F.rms_norm(t.float(), t.shape[-1:], eps=mixer.rms_eps).to(t.dtype) for t in rows)
    return None


def _project_dt(mixer: nn.Module, old: bool, dt_raw: Tensor, dt_proj: nn.Module) -> tuple[Tensor, Tensor | None]:
    """delta (b, l, d), and its bias where the scan adds it."""
    if old:
        return project(dt_raw, dt_proj), None
    if hasattr(getattr(mixer, "config", None), "_is_quantized"):
        # The weight is packed: only the module can multiply with it.
        bias = _with_weights(dt_proj, lambda module: module.bias)
        return dt_proj(dt_raw) - bias, bias
    return _with_weights(dt_proj, lambda module: (linear(dt_raw, module.weight), module.bias))


def _operands_by_head(mixer: nn.Module, u: Tensor, old: bool) -> Direction:
    """B and C (b, l, h, n), from x_proj_weight (h, r + 2n, d / h) and dt_proj_weight (h, d / h, r)."""
    heads, _, states = mixer.A_log.shape
    rank = mixer.dt_proj_weight.shape[-1]
    projected = torch.einsum("blhd,hrd->blhr", u.unflatten(-1, (heads, -1)), mixer.x_proj_weight)
    dt_raw, B, C = projected.split([rank, states, states], dim=-1)
    delta = torch.einsum("blhr,hdr->blhd", dt_raw, mixer.dt_proj_weight).flatten(2)
    bias = None if mixer.dt_proj_bias is None else mixer.dt_proj_bias.flatten()
    if old and bias is not None:
        delta, bias = delta + bias, None
    A = -torch.exp(mixer.A_log.float()).flatten(0, -2)
    return Direction(u, delta, A, B, C, mixer.D.flatten(), bias)
