"""The residual LayerNorm: PyTorch's own. See `contract.Backend`."""

from __future__ import annotations

import torch
from torch import Tensor


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    summed = x.clone() if residual is None else (x.to(weight.dtype) + residual.to(weight.dtype)).to(x.dtype)
    normed, mean, rstd = torch.native_layer_norm(summed.to(weight.dtype), weight.shape, weight, bias, eps)
    return normed.to(x.dtype), summed, mean.flatten(), rstd.flatten()


def norm_backward(
    grad_normed: Tensor, grad_sum: Tensor | None, summed: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    acc = weight.dtype
    per_row = (mean.unsqueeze(-1), rstd.unsqueeze(-1))
    bias = torch.zeros_like(weight)
    grad, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_normed.to(acc), summed.to(acc), weight.shape, *per_row, weight, bias, [True, True, True]
    )
    return (grad if grad_sum is None else grad + grad_sum.to(acc)).to(summed.dtype), grad_weight, grad_bias
