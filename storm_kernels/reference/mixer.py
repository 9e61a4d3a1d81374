"""The plain-PyTorch mixer, Vim's bimamba v2 (arXiv 2401.09417; docs/spec.md): the truth that the fused
one is compared with, and whose parameters it inherits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..plain import call_convolution, call_dt_proj, is_plain, is_plain_convolution
from ..profiling import stage
from ..tokens import TokenGrid, TokenReduction, described, placed, positive_int
from .functions import Direction, bidirectional_selective_scan, causal_conv1d, reduce_tokens, selective_scan


class ReferenceMixer(nn.Module):
    """Bidirectional Mamba-1 mixer, Vim's bimamba v2 with Vim's parameter names (docs/spec.md, Mixer).

    ``bidirectional=False`` is plain Mamba-1.

    ``A_log``, ``D``, the bias of ``dt_proj`` and their backward twins stay float32 when the module
    is moved to a half precision. A child that is more than a plain layer (an adapter, hooks, a
    quantised or replaced layer) is called as a module: a convolution on (batch, E, L), flipped for
    the backward direction; dt_proj on dt_raw, bias included.

    Args:
        d_model: D, the width of the input and the output.
        d_state: S, states of a channel; 16 by default.
        d_conv: K, taps of the convolutions in tokens; 4 by default.
        expand: E / D, channels of the scan by width; 2 by default.
        dt_rank: R, the width from which step sizes are made; "auto", the default, is ceil(D / 16).
        bidirectional: with the second direction (names ending in ``_b``), the default, or without.
        bias: whether in_proj and out_proj have a bias; not by default.
        conv_bias: whether the convolutions have a bias; they have by default.
        if_divide_out: halve the sum of the two directions, Vim's option; not by default.
        dt_min: the least step size that softplus(dt_proj.bias) starts with, log-uniform; 0.001 by default.
        dt_max: the largest, 0.1 by default.
        dt_init_floor: what a step size that starts below is raised to, 1e-4 by default.
        device: of the parameters; None for torch's default.
        dtype: of the parameters that do not stay float32; None for torch's default.

    Raises:
        TypeError: a size that is no integer, an ``expand`` that is no number; named.
        ValueError: a size that is not positive, an ``expand`` that leaves no channel, an empty range of dt; named.

    Source:
        Vim, arXiv 2401.09417, algorithm 1; the start of dt: Mamba, arXiv 2312.00752, 3.6.

    Example:
        >>> mixer = ReferenceMixer(d_model=8, d_state=4)
        >>> mixer(torch.randn(1, 6, 8)).shape
        torch.Size([1, 6, 8])
    """

    in_proj: nn.Linear
    conv1d: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: nn.Parameter
    D: nn.Parameter
    conv1d_b: nn.Conv1d
    x_proj_b: nn.Linear
    dt_proj_b: nn.Linear
    A_b_log: nn.Parameter
    D_b: nn.Parameter
    out_proj: nn.Linear

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        bidirectional: bool = True,
        bias: bool = False,
        conv_bias: bool = True,
        if_divide_out: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        d_model, d_state, d_conv = (
            positive_int(n, size) for n, size in (("d_model", d_model), ("d_state", d_state), ("d_conv", d_conv))
        )
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner = _expanded(d_model, expand)
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) and dt_rank == "auto" else _rank(dt_rank)
        if not 0 < dt_min <= dt_max:
            raise ValueError(
                f"dt_min and dt_max must be positive and in this order, got {described(dt_min)} and {described(dt_max)}"
            )
        self.bidirectional, self.if_divide_out = bidirectional, if_divide_out
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        self.suffixes = ("", "_b") if bidirectional else ("",)
        for suffix in self.suffixes:
            conv = nn.Conv1d(
                self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **factory
            )
            dt_proj = nn.Linear(self.dt_rank, self.d_inner, **factory)
            nn.init.uniform_(dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            dt_proj.bias = nn.Parameter(
                initial_dt_bias(self.d_inner, dt_min, dt_max, dt_init_floor, dt_proj.weight.device)
            )
            rows = torch.arange(1, d_state + 1, dtype=torch.float32, device=device).expand(self.d_inner, -1)
            self.add_module(f"conv1d{suffix}", conv)
            self.add_module(
                f"x_proj{suffix}", nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **factory)
            )
            self.add_module(f"dt_proj{suffix}", dt_proj)
            self.register_parameter("A_b_log" if suffix else "A_log", nn.Parameter(rows.log()))
            self.register_parameter(
                f"D{suffix}", nn.Parameter(torch.ones(self.d_inner, dtype=torch.float32, device=device))
            )
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)
        self.mark_parameters()

    def forward(
        self,
        x: Tensor,
        grid: TokenGrid | None = None,
        reduction: TokenReduction | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Mix x over its tokens, and reduce them where a reduction is given.

        Args:
            x: (batch, L, D), a floating-point dtype.
            grid: where the tokens sit; needed only with a reduction.
            reduction: how they are averaged and sampled; None for all tokens.
            cu_seqlens: (n + 1,) int32 or int64: bounds of sequences packed in a batch of 1; not with a reduction.

        Returns:
            (batch, L', D) in x's dtype.

        Raises:
            TypeError: an argument of the wrong type or dtype, named.
            ValueError: an argument of the wrong shape, a grid that does not hold the tokens; named.
        """
        grid, reduction = self._checked(x, grid, reduction, cu_seqlens)
        with stage("in_proj"):
            x, z = self._project(x, self.in_proj).chunk(2, dim=-1)
        directions = []
        for suffix in self.suffixes:
            with stage("conv"):
                u = self._convolve(x, getattr(self, f"conv1d{suffix}"), bool(suffix), cu_seqlens)
            directions.append(self._direction(u, suffix))
        with stage("scan"):
            y = self._scan(directions, z, cu_seqlens)
        with stage("out_proj"):
            out = self._project(y, self.out_proj)
        return out if reduction is None else reduce_tokens(out, grid, reduction)

    def _checked(
        self, x: Tensor, grid: object, reduction: object, cu_seqlens: object
    ) -> tuple[TokenGrid | None, TokenReduction | None]:
        """(grid, reduction) where there is something to reduce, else (None, None); raise, by name,
        unless the arguments of forward fit.
        """
        check_input("x", x, ("batch", "L"), self.in_proj)
        return placed(x.shape[1], grid, reduction, cu_seqlens)

    @staticmethod
    def _convolve(x: Tensor, conv: nn.Module, reverse: bool, cu_seqlens: Tensor | None) -> Tensor:
        if is_plain_convolution(conv):
            options: dict[str, Any] = {"activation": "silu", "reverse": reverse, "cu_seqlens": cu_seqlens}
            return causal_conv1d(x, conv.weight.squeeze(1), conv.bias, **options)  # type: ignore[return-value]  # no state
        return F.silu(call_convolution(conv, x, reverse=reverse, cu_seqlens=cu_seqlens))

    def _scan(self, directions: list[Direction], z: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        if not self.bidirectional:
            (one,) = directions
            options: dict[str, Any] = {"delta_bias": one.delta_bias, "delta_softplus": True, "cu_seqlens": cu_seqlens}
            return selective_scan(*one[:6], z=z, **options)  # type: ignore[return-value]  # no state
        forward, backward = directions
        y = bidirectional_selective_scan(forward, backward, z, delta_softplus=True, cu_seqlens=cu_seqlens)
        return y / 2 if self.if_divide_out else y

    def _direction(self, u: Tensor, suffix: str) -> Direction:
        """The scan's operands from the convolved input u (batch, L, E)."""
        dt_proj = getattr(self, f"dt_proj{suffix}")
        with stage("x_proj"):
            projected = self._project(u, getattr(self, f"x_proj{suffix}"))
            dt_raw, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        with stage("dt_proj"):
            delta, delta_bias = self._project_dt(dt_raw, dt_proj)
        A = decay(self.A_b_log if suffix else self.A_log)
        return Direction(u, delta, A, B, C, getattr(self, f"D{suffix}"), delta_bias)

    @staticmethod
    def _project(x: Tensor, projection: nn.Module) -> Tensor:
        """``projection(x)``; what a subclass may compute in its own way."""
        out: Tensor = projection(x)
        return out

    @staticmethod
    def _project_dt(dt_raw: Tensor, dt_proj: nn.Module) -> tuple[Tensor, Tensor | None]:
        """delta before the bias that the scan adds, and that bias, if dt_proj has not added it."""
        if is_plain(dt_proj) or dt_raw.is_meta:
            return F.linear(dt_raw, dt_proj.weight), dt_proj.bias  # type: ignore[arg-type, return-value]  # shapes alone
        return call_dt_proj(dt_proj, dt_raw), None

    def mark_parameters(self) -> None:
        """Mark what must not decay (``_no_weight_decay``), and what must not be initialised anew (``_no_reinit``).

        Optimisers' set-ups and mamba_ssm's initialisers read the marks. A loader that puts other
        parameters in the place of these has to call it again.
        """
        for parameter in self._float32_parameters():
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        for suffix in self.suffixes:
            bias = getattr(self._modules.get(f"dt_proj{suffix}"), "bias", None)
            if isinstance(bias, nn.Parameter):
                bias._no_reinit = True  # type: ignore[attr-defined]

    def _float32_parameters(self) -> list[nn.Parameter]:
        """Those that there are: a replaced dt_proj may have no bias, or one that is no parameter."""
        own = [self._parameters.get(name) for name in ("A_log", "A_b_log", "D", "D_b")]
        biases = [getattr(self._modules.get(name), "bias", None) for name in ("dt_proj", "dt_proj_b")]
        return [p for p in (*own, *biases) if isinstance(p, nn.Parameter)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ReferenceMixer:
        """Moves as nn.Module does, but gives the float32 parameters their values back where a half
        precision was asked for.
        """
        before = [p.data for p in self._float32_parameters()]
        super()._apply(fn, recurse)
        for parameter, data in zip(self._float32_parameters(), before, strict=True):
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = data.to(parameter.device)
        return self


def _expanded(d_model: int, expand: object) -> int:
    """E, the channels of a mixer; raise, by name, where there would be none."""
    if isinstance(expand, bool) or not isinstance(expand, Real):
        raise TypeError(f"expand must be a number, got {described(expand)}")
    channels: Any = expand * d_model
    if not 1 <= channels < math.inf:
        raise ValueError(
            "expand must give one channel or more, expand * d_model >= 1, "
            f"got {described(expand)} with d_model={d_model}"
        )
    return int(channels)


def _rank(dt_rank: object) -> int:
    if isinstance(dt_rank, str):
        raise ValueError(f"dt_rank must be 'auto' or a positive integer, got {described(dt_rank)}")
    return positive_int("dt_rank", dt_rank)


def check_input(name: str, value: object, axes: tuple[str, ...], projection: nn.Module, parts: int = 1) -> None:
    """Raise, by name, unless ``value`` is a floating-point tensor with ``axes`` and a last one that
    ``parts`` times fills ``projection``.

    That width is read off the weight where the projection is plain (:func:`is_plain`); what another
    module takes is its own affair.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {described(value)}")
    width = projection.weight.shape[1] // parts if is_plain(projection) else None
    if value.dim() != len(axes) + 1 or (width is not None and value.shape[-1] != width):
        # The channels of an image encoder that is a convolutional network come before height and
        # width.
        first = width is not None and value.dim() == len(axes) + 1 and width in value.shape[1:-1]
        hint = f"; the {width} channels belong on the last axis, see Tensor.movedim" if first else ""
        wanted = ", ".join((*axes, "width" if width is None else str(width)))
        raise ValueError(f"{name} must have {len(axes) + 1} axes ({wanted}), got shape {tuple(value.shape)}{hint}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be of a floating-point dtype, got {value.dtype}")


def decay(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), in float32 or better."""
    return -torch.exp(A_log if A_log.dtype == torch.float64 else A_log.float())


def initial_dt_bias(
    channels: int, dt_min: float = 0.001, dt_max: float = 0.1, floor: float = 1e-4, device: torch.device | None = None
) -> Tensor:
    """A bias of dt_proj whose softplus is log-uniform in [dt_min, dt_max]: (channels,) float32
    (arXiv 2312.00752, 3.6).
    """
    low, high = math.log(dt_min), math.log(dt_max)
    dt = torch.exp(torch.rand(channels, dtype=torch.float32, device=device) * (high - low) + low).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus


class MixerLayer(nn.Module):
    """``X + Mixer(LayerNorm(X))``, one layer of the projector.

    Args:
        mixer: of width D; it becomes a child of the layer.
        device: of the norm; None, the default, for torch's.
        dtype: of the norm; None, the default, for torch's.

    Source:
        STORM, arXiv 2503.04130, eq. 5.

    Example:
        >>> MixerLayer(ReferenceMixer(d_model=8, d_state=4))(torch.randn(1, 6, 8)).shape
        torch.Size([1, 6, 8])
    """

    def __init__(
        self, mixer: ReferenceMixer, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(mixer.d_model, device=device, dtype=dtype)
        self.mixer = mixer

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """x (batch, L, D) -> the same shape; ``cu_seqlens`` as the mixer takes it."""
        with stage("norm"):
            normed = self.norm(x)
        return x + self.mixer(normed, cu_seqlens=cu_seqlens)
