"""Modules with the attributes and parameters of other projects' mixers, computed plainly, token by
token, to patch and to compare with.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


def scan_loop(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, state=None):
    """(b, d, l) operands as mamba_ssm has them; B, C (d, n), (b, n, l) or (b, g, n, l) -> (b, d,
    l), (b, d, n). In the operands' precision.
    """
    batch, channels, length = u.shape

    def of_token(x, t):
        if x.dim() == 2:
            return x.expand(batch, -1, -1)
        if x.dim() == 3:
            return x[:, None, :, t].expand(batch, channels, -1)
        return x[..., t].repeat_interleave(channels // x.shape[1], 1)

    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    h = u.new_zeros(batch, *A.shape) if state is None else state
    outs = []
    for t in range(length):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta[:, :, t] * u[:, :, t])[..., None] * of_token(B, t)
        outs.append((h * of_token(C, t)).sum(-1))
    y = torch.stack(outs, -1)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), h


def conv_loop(x, weight, bias=None, activation=None, history=None):
    """x (b, d, l), weight (d, w): each token meets itself and the w - 1 before it."""
    taps = weight.shape[1]
    history = x.new_zeros(*x.shape[:2], taps - 1) if history is None else history
    padded = torch.cat([history, x], -1)
    out = sum(padded[..., k : k + x.shape[-1]] * weight[:, k, None] for k in range(taps))
    out = out if bias is None else out + bias[:, None]
    return F.silu(out) if activation else out


class Mamba(nn.Module):
    """The attributes of Vim's and VideoMamba's ``Mamba``; ``bimamba_type`` "none", "v1" or "v2"."""

    def __init__(
        self,
        d_model,
        d_state=8,
        d_conv=4,
        expand=2,
        bias=False,
        bimamba_type="none",
        if_devide_out=False,
        init_layer_scale=None,
    ):
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner, self.dt_rank = expand * d_model, math.ceil(d_model / 16)
        self.use_fast_path, self.layer_idx, self.activation = True, 0, "silu"
        self.bimamba_type, self.if_devide_out, self.init_layer_scale = bimamba_type, if_devide_out, init_layer_scale
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(init_layer_scale * torch.ones(d_model))
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)
        for suffix in ("", "_b") if bimamba_type == "v2" else ("",):
            setattr(
                self,
                f"conv1d{suffix}",
                nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1),
            )
            setattr(self, f"x_proj{suffix}", nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False))
            setattr(self, f"dt_proj{suffix}", nn.Linear(self.dt_rank, self.d_inner))
            setattr(self, f"D{suffix}", nn.Parameter(torch.rand(self.d_inner)))
        rows = torch.arange(1.0, d_state + 1).log()
        self.A_log = nn.Parameter(rows + 0.1 * torch.randn(self.d_inner, d_state))
        if bimamba_type != "none":
            self.A_b_log = nn.Parameter(rows + 0.1 * torch.randn(self.d_inner, d_state))

    def forward(self, hidden_states, inference_params=None, T=1):
        x, z = self.in_proj(hidden_states).transpose(1, 2).chunk(2, 1)
        y = self._one(x, z, "", self.A_log)
        if self.bimamba_type == "v2":
            y_b = self._one(x.flip(-1), z.flip(-1), "_b", self.A_b_log).flip(-1)
            y = (y + y_b) / 2 if self.if_devide_out else y + y_b
        elif self.bimamba_type == "v1":
            u, delta, B, C = self._operands(x, "")
            y = y + scan_loop(
                *(t.flip(-1) for t in (u, delta)), -self.A_b_log.exp(), B.flip(-1), C.flip(-1), self.D, z.flip(-1),
                self.dt_proj.bias, True
            )[0].flip(-1)  # fmt: skip
        out = self.out_proj(y.transpose(1, 2))
        return out if self.init_layer_scale is None else out * self.gamma

    def _operands(self, x, suffix):
        conv, dt_proj = getattr(self, f"conv1d{suffix}"), getattr(self, f"dt_proj{suffix}")
        u = conv_loop(x, conv.weight[:, 0], conv.bias, "silu")
        dt, B, C = (
            getattr(self, f"x_proj{suffix}")(u.transpose(1, 2))
            .transpose(1, 2)
            .split([self.dt_rank, self.d_state, self.d_state], 1)
        )
        return u, dt_proj.weight @ dt, B, C

    def _one(self, x, z, suffix, A_log):
        u, delta, B, C = self._operands(x, suffix)
        return scan_loop(
            u, delta, -A_log.exp(), B, C, getattr(self, f"D{suffix}"), z, getattr(self, f"dt_proj{suffix}").bias, True
        )[0]


class LayerCache:
    """The cache of Mamba, FalconMamba in transformers up to 5.3: tensors by layer, and ``cache_position`` beside it."""

    def __init__(self, layers, batch, d_inner, d_conv, d_state):
        self.conv_states = [torch.zeros(batch, d_inner, d_conv) for _ in range(layers)]
        self.ssm_states = [torch.zeros(batch, d_inner, d_state) for _ in range(layers)]


class MambaMixer(nn.Module):
    """The attributes of transformers' old ``MambaMixer`` (a ``slow_forward``, padding masked after in_proj)."""

    def __init__(self, d_model=12, d_state=4, d_conv=4):
        super().__init__()
        self.hidden_size, self.ssm_state_size, self.conv_kernel_size = d_model, d_state, d_conv
        self.intermediate_size, self.time_step_rank, self.layer_idx = 2 * d_model, 2, 0
        self.activation, self.act, self.use_conv_bias = "silu", nn.SiLU(), True
        inner = self.intermediate_size
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=True)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(inner, self.time_step_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.time_step_rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.rand(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=True)

    def slow_forward(self, input_states, cache_params=None, cache_position=None, attention_mask=None):
        x, z = self.in_proj(input_states).transpose(1, 2).chunk(2, 1)
        x = x if attention_mask is None else x * attention_mask[:, None]
        history = state = None
        if cache_params is not None:
            conv_state, state = (
                cache_params.conv_states[self.layer_idx],
                cache_params.ssm_states[self.layer_idx].clone(),
            )
            if cache_position.shape[0] != self.conv_kernel_size:
                history = conv_state[..., 1:].clone()
            conv_state.copy_(
                torch.cat([torch.zeros_like(conv_state) if history is None else conv_state, x], -1)[
                    ..., -self.conv_kernel_size :
                ]
            )
        u = conv_loop(x, self.conv1d.weight[:, 0], self.conv1d.bias, "silu", history)
        u = u if attention_mask is None else u * attention_mask[:, None]
        dt, B, C = self.x_proj(u.transpose(1, 2)).split(
            [self.time_step_rank, self.ssm_state_size, self.ssm_state_size], -1
        )
        delta = self.dt_proj(dt).transpose(1, 2)
        y, state = scan_loop(
            u, delta, -self.A_log.exp(), B.transpose(1, 2), C.transpose(1, 2), self.D, z, None, True, state
        )
        if cache_params is not None:
            cache_params.ssm_states[self.layer_idx].copy_(state)
        return self.out_proj(y.transpose(1, 2))

    def forward(self, hidden_states, cache_params=None, cache_position=None, attention_mask=None):
        return self.slow_forward(hidden_states, cache_params, cache_position, attention_mask)
