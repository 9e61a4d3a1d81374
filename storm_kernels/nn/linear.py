"""A mixer's projections and convolutions: fused or without a detour where the module is plain, the
module itself where it is not (:mod:`plain`).

Matrix products are PyTorch's, but go through float32 where PyTorch has no half-precision kernel for
this CPU. Without AVX-512 or Arm's bfloat16 instructions (float16: AVX512-FP16) PyTorch multiplies
half-precision matrices in a plain loop, ten times slower than float32. Products of halves are exact
in float32 and sums are kept in float32 either way, so the results are as exact.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..backends.pages import LEAST_BYTES, empty
from ..ops.autograd import forward_mode, transformed
from ..plain import call_convolution, call_dt_proj, is_plain, is_plain_convolution, is_silu

# From here on the product outweighs widening the weight (measured on AVX2: equal between 8 and 16
# rows).
_LEAST_ROWS = 16


def _without_kernels() -> frozenset[torch.dtype]:
    """Half precisions that PyTorch's CPU matrix products have no kernel for."""
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return frozenset(dtype for dtype, name in supported.items() if not getattr(torch.ops.mkldnn, name, bool)())


_SLOW = _without_kernels()


def project(x: Tensor, projection: nn.Module, bias: bool = True) -> Tensor:
    """``projection(x)``, or without its bias; a module that is more than a plain ``nn.Linear``
    (hooks, adapters, a packed weight) runs as it is.
    """
    if not bias:
        return linear(x, projection.weight)
    return linear(x, projection.weight, projection.bias) if is_plain(projection) else projection(x)


def project_dt(dt_raw: Tensor, dt_proj: nn.Module) -> tuple[Tensor, Tensor | None]:
    """delta before bias and softplus, and the bias that the scan adds in float32: dt_raw (batch, L,
    R) -> (batch, L, E), (E,) or None.

    A module that is more than a plain ``nn.Linear`` is called, bias and all; nothing is left for
    the scan to add. On the meta device, which has shapes only, formats need not agree and nothing
    is called.
    """
    if is_plain(dt_proj) or dt_raw.is_meta:
        return linear(dt_raw, dt_proj.weight), dt_proj.bias
    return call_dt_proj(dt_proj, dt_raw), None


def convolve(
    x: Tensor,
    conv: nn.Module,
    act: object = None,
    *,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The causal convolution and its activation: x (batch, L, E) -> (batch, L, E).

    ``conv`` is a mixer's ``conv1d``, ``act`` its activation: None, ``F.silu`` or a module; what of
    them is not plain is called, on (batch, E, L). The other arguments are those of
    :func:`storm_kernels.causal_conv1d`.
    """
    options = {"reverse": reverse, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    silu = is_silu(act)
    if is_plain_convolution(conv):
        u = ops.causal_conv1d(x, conv.weight.squeeze(1), conv.bias, activation="silu" if silu else None, **options)
        return u if silu else _activate(u, act)
    return _activate(call_convolution(conv, x, **options), F.silu if silu else act)


def convolve_both(
    x: Tensor, conv: nn.Module, conv_b: nn.Module, act: object = None, *, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`convolve` in both directions: from one read of x where all is plain. Returns two tensors (batch, L, E)."""
    if is_silu(act) and is_plain_convolution(conv) and is_plain_convolution(conv_b):
        weights = (conv.weight.squeeze(1), conv.bias, conv_b.weight.squeeze(1), conv_b.bias)
        return ops.bidirectional_causal_conv1d(x, *weights, activation="silu", cu_seqlens=cu_seqlens)
    return convolve(x, conv, act, cu_seqlens=cu_seqlens), convolve(x, conv_b, act, reverse=True, cu_seqlens=cu_seqlens)


def _activate(u: Tensor, act) -> Tensor:
    return act(u.transpose(1, 2)).transpose(1, 2).contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: x (..., in), weight (out, in), bias (out,) -> (..., out) in x's dtype, or in
    autocast's where that is on.
    """
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    operands = (x, weight) if bias is None else (x, weight, bias)
    alike = autocast or all(t.dtype == dtype for t in operands)
    if dtype not in _SLOW or not alike or x.dtype == torch.float64 or x.numel() < _LEAST_ROWS * x.shape[-1]:
        large = x.numel() // x.shape[-1] * weight.shape[0] * x.element_size() >= LEAST_BYTES if x.shape[-1] else False
        return (
            _product(*operands)
            if large and alike and not autocast and _eager_inference(*operands)
            else F.linear(x, weight, bias)
        )
    operands = tuple(t.to(dtype) for t in operands)
    if transformed() or forward_mode(*operands):
        with torch.autocast("cpu", enabled=False):
            return F.linear(*(t.float() for t in operands)).to(dtype)
    return _Float32Linear.apply(*operands)


def _eager_inference(*operands: Tensor) -> bool:
    """Whether plain tensors are multiplied here and now, and nobody else looks on: no gradient, no
    transform, no mode, no trace.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() or transformed():
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in operands):
        return False
    return all(type(t) in (Tensor, nn.Parameter) for t in operands) and not forward_mode(*operands)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of tensors of one dtype, without autograd, to memory of our own
    (:mod:`storm_kernels.backends.pages`).
    """
    out = empty((*x.shape[:-1], weight.shape[0]), x.dtype, x.device)
    rows, to = x.reshape(-1, x.shape[-1]), out.view(-1, weight.shape[0])
    if bias is None:
        torch.mm(rows, weight.mT, out=to)
    else:
        torch.addmm(bias, rows, weight.mT, out=to)
    return out


def _in_float32(x: Tensor) -> Tensor:
    return empty(x.shape, torch.float32, x.device).copy_(x)


class _Float32Linear(torch.autograd.Function):
    """Keeps the halves for the backward pass, not their float32 copies."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight)
        operands = (x, weight) if bias is None else (x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            # A tensor without memory of its own, as when tracing, or one of a subclass keeps its
            # kind only through PyTorch's own operations.
            if not _eager_inference(*operands):
                return F.linear(*(t.float() for t in operands)).to(x.dtype)
            out = _product(_in_float32(x), *(t.float() for t in operands[1:]))
            return empty(out.shape, x.dtype, x.device).copy_(out)

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = (*ctx.needs_input_grad, False)
        with torch.autocast("cpu", enabled=False):
            grad_out = grad_out.float()
            rows = grad_out.reshape(-1, grad_out.shape[-1])
            grad_x = (grad_out @ weight.float()).to(x.dtype) if wanted[0] else None
            grad_weight = (rows.mT @ x.float().flatten(0, -2)).to(x.dtype) if wanted[1] else None
            grad_bias = rows.sum(0).to(x.dtype) if wanted[2] else None
        return (grad_x, grad_weight, grad_bias)[: len(ctx.needs_input_grad)]
