"""Residual addition and LayerNorm in one pass; statistics and parameter gradients in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import NORM, NORM_PROGRAMS
from .launch import launch
from .math import cast, product


@triton.jit
def norm_kernel(
    x,
    x_stride,
    residual,
    residual_stride,
    weight,
    bias,
    normed,
    summed,
    mean,
    rstd,
    channels,
    eps,
    BLOCK_C: tl.constexpr,
):
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    mask = channel < channels
    value = tl.load(x + row * x_stride + channel, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + row * residual_stride + channel, mask=mask, other=0.0).to(tl.float32)
    rounded = cast(value, summed.dtype.element_ty)
    tl.store(summed + row * channels + channel, rounded, mask=mask)
    value = rounded.to(tl.float32)
    average = tl.sum(value, 0) / channels
    centred = tl.where(mask, value - average, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(product(centred, centred), 0) / channels + eps)
    out = centred * inverse * tl.load(weight + channel, mask=mask, other=0.0)
    if bias is not None:
        out += tl.load(bias + channel, mask=mask, other=0.0)
    tl.store(normed + row * channels + channel, cast(out, normed.dtype.element_ty), mask=mask)
    tl.store(mean + row, average)
    tl.store(rstd + row, inverse)


@triton.jit(do_not_specialize=["rows"])
def norm_backward_kernel(
    grad,
    grad_strides,
    grad_sum,
    grad_sum_strides,
    summed,
    summed_stride,
    weight,
    mean,
    rstd,
    out,
    partials,
    rows,
    channels,
    BLOCK_C: tl.constexpr,
):
    """Each program takes every `num_programs`-th row and writes its sums for weight and bias, (2, channels), once."""
    channel = tl.arange(0, BLOCK_C)
    mask = channel < channels
    scale = tl.load(weight + channel, mask=mask, other=0.0)
    weight_sum = tl.zeros([BLOCK_C], tl.float32)
    bias_sum = tl.zeros([BLOCK_C], tl.float32)
    for turn in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = turn + tl.zeros([1], tl.int64)
        value = tl.load(summed + row * summed_stride + channel, mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(grad + row * grad_strides[0] + channel * grad_strides[1], mask=mask, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row)
        normal = tl.where(mask, (value - tl.load(mean + row)) * inverse, 0.0)
        weight_sum += dout * normal
        bias_sum += dout
        dnormal = product(dout, scale)
        dvalue = inverse * (
            dnormal - tl.sum(dnormal, 0) / channels - normal * (tl.sum(product(dnormal, normal), 0) / channels)
        )
        if grad_sum is not None:
            dvalue += tl.load(
                grad_sum + row * grad_sum_strides[0] + channel * grad_sum_strides[1], mask=mask, other=0.0
            ).to(tl.float32)
        tl.store(out + row * channels + channel, cast(dvalue, out.dtype.element_ty), mask=mask)
    partials += tl.program_id(0) * 2 * channels + channel
    tl.store(partials, weight_sum, mask=mask)
    tl.store(partials + channels, bias_sum, mask=mask)


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`contract.Backend.norm`."""
    rows, channels = x.shape
    normed, summed = (torch.empty(rows, channels, dtype=x.dtype, device=x.device) for _ in range(2))
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    residual_stride = 0 if residual is None else residual.stride(0)
    operands = (x, x.stride(0), residual, residual_stride, weight, bias, normed, summed, mean, rstd, channels, eps)
    launch(norm_kernel, rows, NORM, x.device, *operands, BLOCK_C=triton.next_power_of_2(channels))
    return normed, summed, mean, rstd


def norm_backward(
    grad_normed: Tensor, grad_sum: Tensor | None, summed: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`contract.Backend.norm_backward`."""
    rows, channels = summed.shape
    device = summed.device
    programs = min(rows, NORM_PROGRAMS)
    out = torch.empty(rows, channels, dtype=summed.dtype, device=device)
    partials = torch.empty(programs, 2, channels, dtype=torch.float32, device=device)
    grads = (grad_normed, grad_normed.stride(), grad_sum, (0, 0) if grad_sum is None else grad_sum.stride())
    operands = (*grads, summed, summed.stride(0), weight, mean, rstd, out, partials, rows, channels)
    launch(norm_backward_kernel, programs, NORM, device, *operands, BLOCK_C=triton.next_power_of_2(channels))
    return out, partials[:, 0].sum(0), partials[:, 1].sum(0)
