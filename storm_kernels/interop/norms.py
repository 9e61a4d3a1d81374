"""mamba_ssm's residual norms (``mamba_ssm.ops.triton.layer_norm``) in plain PyTorch: sums in
float32, results in x's dtype.

The signatures are those of mamba_ssm 2.x. Version 1.x had no ``x1`` to ``rowscale``: there the
number after the residual was ``eps`` of ``layer_norm_fn`` and ``prenorm`` of ``rms_norm_fn``. A
number in that place is read so, a tensor or None as ``x1``.
"""

from __future__ import annotations

from numbers import Number

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tokens import described
from .layout import accumulate


def layer_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    is_rms_norm=False,
    return_dropout_mask=False,
):
    """Norm over the last axis of ``dropout(x * rowscale) + dropout(x1) + residual``, in x's dtype.

    x, x1, residual (..., n); weight, bias, weight1, bias1 (n,); rowscale (...), not with ``x1``.
    ``dropout_p`` always acts: pass 0 to infer. Returns the norm; with ``weight1`` also the norm
    with weight1 and bias1; with ``prenorm`` also the sum, in the residual's dtype, or where there
    is no residual in x's, or float32 with ``residual_in_fp32``; with ``return_dropout_mask`` also
    what was kept of x and of x1, boolean, or None.
    """
    if _is_number(x1):  # version 1.x: eps, prenorm, residual_in_fp32, is_rms_norm
        is_rms_norm = eps if isinstance(eps, bool) else is_rms_norm
        eps, x1, prenorm, weight1 = x1, None, prenorm if weight1 is None else weight1, None
        residual_in_fp32, bias1 = residual_in_fp32 if bias1 is None else bias1, None
    _check(x, residual, x1, weight1, bias1, rowscale)
    acc = accumulate(x, weight)
    summed, kept = _drop(x.to(acc) if rowscale is None else x.to(acc) * rowscale.to(acc).unsqueeze(-1), dropout_p)
    kept1 = None
    if x1 is not None:
        more, kept1 = _drop(x1.to(acc), dropout_p)
        summed = summed + more
    summed = summed if residual is None else summed + residual.to(acc)
    results = [_norm(summed, weight, bias, eps, is_rms_norm).to(x.dtype)]
    if weight1 is not None:
        results.append(_norm(summed, weight1, bias1, eps, is_rms_norm).to(x.dtype))
    if prenorm:
        fresh = acc if residual_in_fp32 else x.dtype
        results.append(summed.to(fresh if residual is None else residual.dtype))
    if return_dropout_mask:
        results += [kept, kept1]
    return results[0] if len(results) == 1 else tuple(results)


def rms_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    return_dropout_mask=False,
):
    """:func:`layer_norm_fn` with the root mean square in place of mean and variance."""
    if _is_number(x1):  # version 1.x: prenorm, residual_in_fp32, eps
        prenorm, x1, residual_in_fp32, weight1 = x1, None, residual_in_fp32 if weight1 is None else weight1, None
        eps, bias1 = eps if bias1 is None else bias1, None
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32, True,
        return_dropout_mask
    )  # fmt: skip


def _is_number(x) -> bool:
    return isinstance(x, Number)


def _check(
    x: Tensor,
    residual: Tensor | None,
    x1: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    rowscale: Tensor | None,
) -> None:
    tensors = {"residual": (residual, x.shape), "x1": (x1, x.shape), "rowscale": (rowscale, x.shape[:-1])}
    tensors |= {"weight1": (weight1, x.shape[-1:]), "bias1": (bias1, x.shape[-1:])}
    for name, (tensor, shape) in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {described(tensor)}")
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)} for x {tuple(x.shape)}, got shape {tuple(tensor.shape)}")
    if x1 is not None and rowscale is not None:
        raise ValueError("rowscale cannot be combined with x1: mamba_ssm does not define which of the two it scales")


def _drop(x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    """x with its elements dropped at probability p and the others scaled by 1 / (1 - p), and which
    were kept; None for p = 0.
    """
    if p == 0:
        return x, None
    kept = torch.rand_like(x) >= p
    return torch.where(kept, x / (1 - p), 0), kept


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms_norm: bool) -> Tensor:
    shape, weight, bias = weight.shape, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if not is_rms_norm:
        return F.layer_norm(x, shape, weight, bias, eps)
    normed = F.rms_norm(x, shape, weight, eps)
    return normed if bias is None else normed + bias


def layer_norm_ref(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    dropout_mask=None,
    dropout_mask1=None,
    upcast=False,
    is_rms_norm=False,
):
    """:func:`layer_norm_fn` with the masks of its dropout given (True keeps); the sum comes in x's
    dtype, or float32 with ``upcast``.
    """
    if _is_number(x1):  # version 1.x: eps, prenorm, upcast
        eps, x1, prenorm, weight1 = x1, None, prenorm if weight1 is None else weight1, None
        upcast, bias1 = upcast if bias1 is None else bias1, None
    dtype = accumulate(x, weight) if upcast else x.dtype
    if dropout_mask is not None:
        x = (x if rowscale is None else x * rowscale.unsqueeze(-1)).masked_fill(~dropout_mask, 0) / (1 - dropout_p)
        x1 = x1 if x1 is None or dropout_mask1 is None else x1.masked_fill(~dropout_mask1, 0) / (1 - dropout_p)
        dropout_p, rowscale = 0.0, None
    residual = residual if residual is None else residual.to(dtype)
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, upcast, is_rms_norm
    )


def rms_norm_ref(x, weight, bias, residual=None, *args, **options):
    """:func:`layer_norm_ref` with the root mean square in place of mean and variance."""
    return layer_norm_ref(x, weight, bias, residual, *args, is_rms_norm=True, **options)


class RMSNorm(nn.Module):
    """RMS norm over the last axis of ``hidden_size`` entries, with the residual arguments of :func:`rms_norm_fn`.

    ``dropout_p`` drops elements of x in training, before the residual is added.
    """

    def __init__(self, hidden_size, eps=1e-5, dropout_p=0.0, device=None, dtype=None):
        super().__init__()
        if not _is_number(dropout_p):  # version 1.x: hidden_size, eps, device, dtype
            dropout_p, device, dtype = 0.0, dropout_p, dtype if device is None else device
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The weight to ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False):
        """x (..., hidden_size) -> the same shape; with ``prenorm`` the pair of the norm and the sum."""
        drop = getattr(self, "drop", None)  # a module pickled before mamba_ssm 2.0 has none
        dropout_p = drop.p if drop is not None and self.training else 0.0
        return rms_norm_fn(
            x, self.weight, self.bias, residual, eps=self.eps, dropout_p=dropout_p, prenorm=prenorm,
            residual_in_fp32=residual_in_fp32
        )  # fmt: skip
