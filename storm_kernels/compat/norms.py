"""mamba_ssm's residual norms (``mamba_ssm.ops.triton.layernorm``) in plain PyTorch: sums in float32, results in x's dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layout import accumulate


def layer_norm_fn(x, weight, bias, residual=None, eps=1e-6, prenorm=False, residual_in_fp32=False, is_rms_norm=False):
    """Norm of ``x + residual`` over the last axis, in x's dtype; with ``prenorm`` also that sum, in float32 with ``residual_in_fp32``."""
    acc = accumulate(x, weight)
    summed = x.to(acc) if residual is None else x.to(acc) + residual.to(acc)
    shape, gain = weight.shape, weight.to(acc)
    if is_rms_norm:
        normed = F.rms_norm(summed, shape, gain, eps)
        normed = normed if bias is None else normed + bias.to(acc)
    else:
        normed = F.layer_norm(summed, shape, gain, None if bias is None else bias.to(acc), eps)
    normed = normed.to(x.dtype)
    if not prenorm:
        return normed
    residual_dtype = acc if residual_in_fp32 else x.dtype if residual is None else residual.dtype
    return normed, summed.to(residual_dtype)


def rms_norm_fn(x, weight, bias, residual=None, prenorm=False, residual_in_fp32=False, eps=1e-6):
    """:func:`layer_norm_fn` with the root mean square in place of mean and variance."""
    return layer_norm_fn(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm=True)


class RMSNorm(nn.Module):
    """RMS norm over the last axis of ``hidden_size`` entries, with the residual arguments of :func:`rms_norm_fn`."""

    def __init__(self, hidden_size, eps=1e-5, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False):
        """x (..., hidden_size) -> the same shape; with ``prenorm`` the pair of the norm and the sum."""
        return rms_norm_fn(x, self.weight, self.bias, residual, prenorm, residual_in_fp32, self.eps)
