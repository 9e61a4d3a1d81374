"""The plain-PyTorch mixer, Vim's bimamba v2 (arXiv 2401.09417; docs/spec.md): the truth that the fused
one is compared with, and whose parameters it inherits.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..plain import call_convolution, call_dt_proj, is_plain, is_plain_convolution
from ..profiling import stage
from ..tokens import TokenGrid, TokenReduction, described, placed, positive_int
from .functions import Direction, bidirectional_selective_scan, causal_conv1d, reduce_tokens, selective_scan


class ReferenceMixer(nn.Module):
    """Bidirectional Mamba-1 mixer, Vim's bimamba v2 with Vim's parameter names (docs/spec.md,
    Mixer); ``bidirectional=False`` is plain Mamba-1.

    ``A_log``, ``D``, the bias of ``dt_proj`` and their backward twins stay float32 when the module
    is moved to a half precision. A child that is more than a plain layer (an adapter, hooks, a
    quantised or replaced layer) is called as a module: a convolution on (batch, E, L), flipped for
    the backward direction; dt_proj on dt_raw, bias included.

    Args:
        d_model: width D of the input and the output.
        d_state, d_conv, expand: S, K and E / D.
        dt_rank: R, or "auto" for ceil(D / 16).
        bidirectional: with the second direction (names ending in ``_b``) or without.
        bias, conv_bias: whether in_proj and out_proj, and the convolutions, have a bias.
        if_divide_out: halve the sum of the two directions, Vim's option.
        dt_min, dt_max, dt_init_floor: the range in which softplus(dt_proj.bias) starts,
            log-uniform (arXiv 2312.00752, 3.6).

    Raises:
        TypeError, ValueError: a size that is no positive integer, an ``expand`` that leaves no
            channel, an empty range of dt; named.
    """

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
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
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
        """x (batch, L, D) -> (batch, L', D) in x's dtype; with a reduction, ``grid`` says where the tokens sit."""
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
        self, x: object, grid: object, reduction: object, cu_seqlens: object
    ) -> tuple[TokenGrid | None, TokenReduction | None]:
        """(grid, reduction) where there is something to reduce, else (None, None); raise, by name,
        unless the arguments of forward fit.
        """
        check_input("x", x, ("batch", "L"), self.in_proj)
        return placed(x.shape[1], grid, reduction, cu_seqlens)

    @staticmethod
    def _convolve(x: Tensor, conv: nn.Module, reverse: bool, cu_seqlens: Tensor | None) -> Tensor:
        if is_plain_convolution(conv):
            return causal_conv1d(
                x, conv.weight.squeeze(1), conv.bias, activation="silu", reverse=reverse, cu_seqlens=cu_seqlens
            )
        return F.silu(call_convolution(conv, x, reverse=reverse, cu_seqlens=cu_seqlens))

    def _scan(self, directions: list[Direction], z: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        if not self.bidirectional:
            (one,) = directions
            return selective_scan(*one[:6], z=z, delta_bias=one.delta_bias, delta_softplus=True, cu_seqlens=cu_seqlens)
        y = bidirectional_selective_scan(*directions, z=z, delta_softplus=True, cu_seqlens=cu_seqlens)
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
        return projection(x)

    @staticmethod
    def _project_dt(dt_raw: Tensor, dt_proj: nn.Module) -> tuple[Tensor, Tensor | None]:
        """delta before the bias that the scan adds, and that bias, if dt_proj has not added it."""
        if is_plain(dt_proj) or dt_raw.is_meta:
            return F.linear(dt_raw, dt_proj.weight), dt_proj.bias
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

    def _apply(self, fn, recurse=True):
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
    if not 1 <= expand * d_model < math.inf:
        raise ValueError(
            "expand must give one channel or more, expand * d_model >= 1, "
            f"got {described(expand)} with d_model={d_model}"
        )
    return int(expand * d_model)


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
    """``X + Mixer(LayerNorm(X))``, one layer of the projector (STORM eq. 5)."""

    def __init__(self, mixer: ReferenceMixer, **factory):
        super().__init__()
        self.norm = nn.LayerNorm(mixer.d_model, **factory)
        self.mixer = mixer

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """x (batch, L, D) -> the same shape."""
        with stage("norm"):
            normed = self.norm(x)
        return x + self.mixer(normed, cu_seqlens=cu_seqlens)
