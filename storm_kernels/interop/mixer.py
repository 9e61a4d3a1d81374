"""``Mamba`` as mamba_ssm, Vim, VideoMamba and BIMBA construct and call it, on our kernels.

The same forward serves modules of their own classes, through :mod:`storm_kernels.interop.patching`.
Shapes: hidden states (b, l, d_model), d = d_inner channels, n states, w taps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.core import Branch, mixer_core, operands, scan
from ..nn.linear import convolve, project
from ..reference import ReferenceMixer
from ..reference.mixer import decay

BIDIRECTIONAL_TYPES = ("none", "v1", "v2")


def check_bimamba_type(bimamba_type: str | None) -> str:
    """``bimamba_type`` if it is one we have, "none" for None; otherwise raise, naming it and those that there are."""
    kind = "none" if bimamba_type is None else bimamba_type
    if kind == "v3":
        raise NotImplementedError(
            "bimamba_type='v3' (SegMamba's third scan, over slices) is not supported; supported are "
            + ", ".join(map(repr, BIDIRECTIONAL_TYPES))
        )
    if kind not in BIDIRECTIONAL_TYPES:
        raise ValueError(
            f"bimamba_type must be one of {', '.join(map(repr, BIDIRECTIONAL_TYPES))}, got {bimamba_type!r}"
        )
    return kind


def bidirectional_kind(mixer: nn.Module) -> str:
    """Read off a mixer's parameters: "none", "v1" (own A_b_log only) or "v2" (own convolution and projections too)."""
    if hasattr(mixer, "conv1d_b"):
        return "v2"
    return "v1" if hasattr(mixer, "A_b_log") else "none"


class MambaForward(nn.Module):
    """What ``Mamba`` does with its parameters; expects the attribute names of the original class."""

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
    gamma: nn.Parameter
    d_conv: int
    d_state: int
    layer_idx: int | None

    def forward(self, hidden_states: Tensor, inference_params: Any = None, T: int = 1) -> Tensor:
        """hidden_states (b, l, d_model) -> the same shape.

        ``inference_params`` (an object with ``seqlen_offset`` and ``key_value_memory_dict``) makes
        a forward-only mixer keep its state and, with an offset above 0, take one token at a time; a
        bidirectional mixer needs the whole sequence and raises. ``T``, VideoMamba's number of
        frames, is accepted and changes nothing, as there.
        """
        kind = bidirectional_kind(self)
        if inference_params is not None:
            if kind != "none":
                raise NotImplementedError(
                    f"a bidirectional mixer ({kind!r}) cannot decode step by step: its backward scan needs the future"
                )
            conv_state, ssm_state = self._get_states_from_cache(inference_params, hidden_states.shape[0])
            if inference_params.seqlen_offset > 0:
                return self.step(hidden_states, conv_state, ssm_state)[0]
            return self._out(self._prefill(hidden_states, conv_state, ssm_state))
        x, z = project(hidden_states, self.in_proj).chunk(2, dim=-1)
        y = self._scan_all(x, z, kind)
        if getattr(self, "if_divide_out", False) or getattr(self, "if_devide_out", False):
            y = y / 2 if kind == "v2" else y
        return self._out(y)

    def _scan_all(self, x: Tensor, z: Tensor, kind: str) -> Tensor:
        """Convolved, scanned in each direction, gated: x, z (b, l, d) -> (b, l, d)."""
        forward = self._forward_branch()
        if kind == "none":
            return mixer_core(x, z, [forward], _activation(self))
        backward_A = decay(self.A_b_log)
        if kind == "v2":
            backward = Branch(self.conv1d_b, self.x_proj_b, self.dt_proj_b, backward_A, self.D_b)
            return mixer_core(x, z, [forward, backward], _activation(self))
        direction = operands(convolve(x, self.conv1d, _activation(self)), *forward[1:])
        return scan([direction, direction._replace(A=backward_A)], z)

    def _forward_branch(self) -> Branch:
        return Branch(self.conv1d, self.x_proj, self.dt_proj, decay(self.A_log), self.D)

    def _out(self, y: Tensor) -> Tensor:
        out = project(y, self.out_proj)
        return out * self.gamma if hasattr(self, "gamma") else out

    def _prefill(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """Gated y (b, l, d); the states after the last token are written to ``conv_state`` (b, d,
        w) and ``ssm_state`` (b, d, n).
        """
        x, z = project(hidden_states, self.in_proj).chunk(2, dim=-1)
        # A negative pad crops: the last w inputs, with zeros before a shorter sequence.
        conv_state.copy_(F.pad(x.transpose(1, 2), (self.d_conv - x.shape[1], 0)))
        y, state = mixer_core(x, z, [self._forward_branch()], _activation(self), return_final_state=True)
        ssm_state.copy_(state)
        return y

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token: hidden_states (b, 1, d_model) -> (the same shape, conv_state, ssm_state), both
        states updated in place.
        """
        if hidden_states.shape[1] != 1:
            raise ValueError(
                "step takes one token at a time: hidden_states must be (batch, 1, d_model), "
                f"got shape {tuple(hidden_states.shape)}"
            )
        x, z = project(hidden_states, self.in_proj).chunk(2, dim=-1)
        history = conv_state[..., 1:].to(x.dtype, copy=True)
        conv_state.copy_(torch.cat([conv_state[..., 1:], x.transpose(1, 2).to(conv_state.dtype)], -1))
        branch = self._forward_branch()
        before = ssm_state.to(branch.A.dtype, copy=True)
        y, state = mixer_core(
            x, z, [branch], _activation(self), history=history, initial_state=before, return_final_state=True
        )
        ssm_state.copy_(state)
        return self._out(y), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Zero states (b, d, w) and (b, d, n), in the convolution's dtype unless told; they do not
        grow with ``max_seqlen``.
        """
        floating = (p.dtype for p in self.conv1d.parameters() if p.is_floating_point())
        dtype = next(floating, self.D.dtype) if dtype is None else dtype
        conv_state = self.D.new_zeros(batch_size, self.D.shape[0], self.d_conv, dtype=dtype)
        return conv_state, self.D.new_zeros(batch_size, self.D.shape[0], self.d_state, dtype=dtype)

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise ValueError("inference_params needs a mixer with a layer_idx: construct Mamba(..., layer_idx=i)")
        memory = inference_params.key_value_memory_dict
        if self.layer_idx not in memory:
            memory[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        states = memory[self.layer_idx]
        if initialize_states:
            for state in states:
                state.zero_()
        return states


def _activation(mixer: nn.Module) -> object:
    """The convolution's activation; older mixers keep none beside its name."""
    return getattr(mixer, "act", None)


class Mamba(MambaForward, ReferenceMixer):  # type: ignore[misc]  # another forward than the reference's
    """mamba_ssm's ``Mamba``, with the bidirectional options of Vim, VideoMamba and BIMBA in every spelling.

    Args:
        d_model: width of the input and the output.
        d_state: states of a channel; 16 by default.
        d_conv: taps of the convolutions in tokens; 4 by default.
        expand: channels of the scan by d_model; 2 by default.
        dt_rank: the width from which step sizes are made; "auto", the default, is ceil(d_model / 16).
        dt_min: the least step size that softplus(dt_proj.bias) starts with, log-uniform; 0.001 by default.
        dt_max: the largest, 0.1 by default.
        dt_init: how dt_proj.weight starts, "random", the default, or "constant".
        dt_scale: a factor on that; 1 by default.
        dt_init_floor: what a step size that starts below is raised to, 1e-4 by default.
        conv_bias: whether the convolutions have a bias; they have by default.
        bias: whether in_proj and out_proj have one; not by default.
        use_fast_path: accepted and changes nothing; a bidirectional mixer is bidirectional with
            either value (Vim's own is not).
        layer_idx: where an inference cache keeps the states; None for nowhere.
        device: of the parameters; None for torch's default.
        dtype: of the parameters that do not stay float32; None for torch's default.
        bimamba_type: "none", the default, "v1" or "v2" (Vim).
        if_divide_out: halve the sum of the two directions of "v2"; not by default.
        init_layer_scale: start of a learned factor ``gamma`` (d_model,) on the output, none if None.
        bimamba: True is "v2" (VideoMamba, BIMBA); None, the default, leaves it to ``bimamba_type``.
        if_devide_out: as ``if_divide_out``, in the spelling of some.
        unknown: anything else is a TypeError that names it.

    Example:
        >>> Mamba(d_model=8, d_state=4, bimamba_type="v2")(torch.randn(1, 6, 8)).shape
        torch.Size([1, 6, 8])

    ``A_log``, ``D``, the bias of ``dt_proj`` and their backward twins stay float32 when the module
    is moved to a half precision.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bimamba_type: str | None = "none",
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
        bimamba: bool | None = None,
        if_devide_out: bool | None = None,
        **unknown: Any,
    ) -> None:
        kind = check_bimamba_type(bimamba_type)
        if unknown:
            raise TypeError(f"Mamba got unknown arguments: {', '.join(f'{k}={v!r}' for k, v in unknown.items())}")
        if bimamba and kind == "v1":
            raise ValueError(
                f"bimamba={bimamba!r} means bimamba_type='v2' and contradicts bimamba_type={bimamba_type!r}"
            )
        kind = "v2" if bimamba else kind
        divide = bool(if_divide_out or if_devide_out)
        super().__init__(
            d_model, d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=dt_rank, bidirectional=kind == "v2",
            bias=bias, conv_bias=conv_bias, if_divide_out=divide, dt_min=dt_min, dt_max=dt_max,
            dt_init_floor=dt_init_floor, device=device, dtype=dtype,
        )  # fmt: skip
        self.expand, self.layer_idx, self.use_fast_path, self.bimamba_type = expand, layer_idx, use_fast_path, kind
        self.activation, self.act = "silu", nn.SiLU()
        for suffix in self.suffixes:
            _init_dt_weight(getattr(self, f"dt_proj{suffix}").weight, dt_init, self.dt_rank**-0.5 * dt_scale)
        if kind == "v1":
            self.A_b_log = nn.Parameter(self.A_log.detach().clone())
            self.A_b_log._no_weight_decay = True  # type: ignore[attr-defined]  # a mark for optimisers
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(
                torch.full((d_model,), float(init_layer_scale), dtype=torch.get_default_dtype(), device=device)
            )


def _init_dt_weight(weight: Tensor, dt_init: str, scale: float) -> None:
    if dt_init == "constant":
        nn.init.constant_(weight, scale)
    elif dt_init == "random":
        nn.init.uniform_(weight, -scale, scale)
    else:
        raise ValueError(f"dt_init must be 'random' or 'constant', got {dt_init!r}")
