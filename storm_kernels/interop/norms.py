"""mamba_ssm's residual norms (``mamba_ssm.ops.triton.layer_norm``) in plain PyTorch: sums in
float32, results in x's dtype.

The signatures are those of mamba_ssm 2.x. Version 1.x had no ``x1`` to ``rowscale``: there the
number after the residual was ``eps`` of ``layer_norm_fn`` and ``prenorm`` of ``rms_norm_fn``. A
number in that place is read so, a tensor or None as ``x1``.
"""

from __future__ import annotations

from numbers import Number
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tokens import described
from .layout import accumulate


def layer_norm_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, x1: Any = None,
    weight1: Any = None, bias1: Any = None, eps: float = 1e-6, dropout_p: float = 0.0,
    rowscale: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False,
    is_rms_norm: bool = False, return_dropout_mask: bool = False,
) -> Any:  # fmt: skip
    """Norm over the last axis of ``dropout(x * rowscale) + dropout(x1) + residual``, in x's dtype.

    Args:
        x: (..., n).
        weight: (n,), the scale.
        bias: (n,), the shift, or None.
        residual: (..., n), added before the norm; None for none.
        x1: (..., n), added too; None for none.
        weight1: (n,), of a second norm of the sum; None for none.
        bias1: (n,), of that; None for none.
        eps: added to the variance, 1e-6 by default.
        dropout_p: the probability at which elements of x and x1 are dropped; it always acts: 0, the default, to infer.
        rowscale: (...), a factor on each row of x, not with ``x1``; None for none.
        prenorm: also return the sum; not by default.
        residual_in_fp32: the sum in float32 where there is no residual; in x's dtype by default.
        is_rms_norm: the root mean square in place of mean and variance; not by default.
        return_dropout_mask: also return what was kept; not by default.

    Returns:
        The norm; with ``weight1`` also the norm with weight1 and bias1; with ``prenorm`` also the sum,
        in the residual's dtype where there is one; with ``return_dropout_mask`` also what was kept of
        x and of x1, boolean, or None.

    Source:
        mamba_ssm.ops.triton.layer_norm.

    Example:
        >>> layer_norm_fn(torch.tensor([[1.0, 3.0]]), torch.ones(2), None).round(decimals=3)
        tensor([[-1.,  1.]])
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
    results: list[Any] = [_norm(summed, weight, bias, eps, is_rms_norm).to(x.dtype)]
    if weight1 is not None:
        results.append(_norm(summed, weight1, bias1, eps, is_rms_norm).to(x.dtype))
    if prenorm:
        fresh = acc if residual_in_fp32 else x.dtype
        results.append(summed.to(fresh if residual is None else residual.dtype))
    if return_dropout_mask:
        results += [kept, kept1]
    return results[0] if len(results) == 1 else tuple(results)


def rms_norm_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, x1: Any = None,
    weight1: Any = None, bias1: Any = None, eps: float = 1e-6, dropout_p: float = 0.0,
    rowscale: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:  # fmt: skip
    """:func:`storm_kernels.interop.mamba_ssm.layer_norm_fn` of ``is_rms_norm``, with the same arguments.

    Example:
        >>> rms_norm_fn(torch.tensor([[3.0, 4.0]]), torch.ones(2), None).round(decimals=2)
        tensor([[0.8500, 1.1300]])
    """
    if _is_number(x1):  # version 1.x: prenorm, residual_in_fp32, eps
        prenorm, x1, residual_in_fp32, weight1 = x1, None, residual_in_fp32 if weight1 is None else weight1, None
        eps, bias1 = eps if bias1 is None else bias1, None
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32, True,
        return_dropout_mask
    )  # fmt: skip


def _is_number(x: object) -> bool:
    return isinstance(x, Number)


def _check(
    x: Tensor, residual: Tensor | None, x1: Tensor | None, weight1: Tensor | None, bias1: Tensor | None,
    rowscale: Tensor | None,
) -> None:  # fmt: skip
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
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, x1: Any = None,
    weight1: Any = None, bias1: Any = None, eps: float = 1e-6, dropout_p: float = 0.0,
    rowscale: Tensor | None = None, prenorm: bool = False, dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None, upcast: bool = False, is_rms_norm: bool = False,
) -> Any:  # fmt: skip
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


def rms_norm_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, *args: Any, **options: Any
) -> Any:
    """:func:`layer_norm_ref` with the root mean square in place of mean and variance."""
    return layer_norm_ref(x, weight, bias, residual, *args, **options | {"is_rms_norm": True})


class RMSNorm(nn.Module):
    """RMS norm over the last axis of ``hidden_size`` entries, with the residual arguments of :func:`rms_norm_fn`.

    Args:
        hidden_size: n, the entries of the last axis.
        eps: added to the mean square, 1e-5 by default.
        dropout_p: drops elements of x in training, before the residual is added; 0 by default.
        device: of the weight; None for torch's default.
        dtype: of the weight; None for torch's default.

    Source:
        mamba_ssm.ops.triton.layer_norm.

    Example:
        >>> RMSNorm(2)(torch.tensor([[3.0, 4.0]])).round(decimals=2)
        tensor([[0.8500, 1.1300]], grad_fn=<RoundBackward1>)
    """

    bias: None

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, dropout_p: Any = 0.0, device: Any = None, dtype: Any = None
    ) -> None:
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

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        """x (..., hidden_size) -> the same shape; with ``prenorm`` the pair of the norm and the sum."""
        drop = getattr(self, "drop", None)  # a module pickled before mamba_ssm 2.0 has none
        dropout_p = drop.p if drop is not None and self.training else 0.0
        return rms_norm_fn(
            x, self.weight, self.bias, residual, eps=self.eps, dropout_p=dropout_p, prenorm=prenorm,
            residual_in_fp32=residual_in_fp32
        )  # fmt: skip
