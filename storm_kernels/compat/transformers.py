"""The Mamba, FalconMamba and Jamba mixers of transformers on our kernels: prefill, cached decoding and training, in three generations.

Same results as the plain PyTorch path of the generation that a module comes from, which is recognised by its structure:

- old (up to 5.15): a ``slow_forward``; padding is masked after in_proj, the bias of dt_proj belongs to dt_proj, a carried state continues;
- present (from 5.16): padding is masked before in_proj, the bias of dt_proj is added in float32, and several tokens after a cached prefix
  start from a zero state (as transformers' own fallback does); one token continues the state.

Three kinds of cache: a list of layers with conv_states and recurrent_states; one object with conv_states and ssm_states by layer, with
``cache_position`` (Mamba, FalconMamba) or with ``has_previous_state`` (Jamba). Nothing here imports transformers.
Symbols: b batch, l tokens, d channels, n states, w taps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..linear import project


def mixer_forward(mixer: nn.Module, hidden_states: Tensor, cache, attention_mask: Tensor | None, cache_position: Tensor | None = None) -> Tensor:
    """What the mixer's own forward computes: hidden_states (b, l, d_model) -> the same shape; ``cache``, where given, is updated in place.

    ``attention_mask`` (b, l): zero where a token is padding.
    """
    dtype, old = hidden_states.dtype, hasattr(mixer, "slow_forward")
    mask = None if attention_mask is None else attention_mask.unsqueeze(-1)
    if not old:
        hidden_states = _masked(hidden_states, mask)
    x, z = project(hidden_states, mixer.in_proj).chunk(2, dim=-1)
    if old:
        x = _masked(x, mask)
    past = None if cache is None else _past(mixer, cache, x.shape[1], old, cache_position)
    history, state = (None, None) if past is None else past.read()
    u = ops.causal_conv1d(x, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, activation="silu", initial_state=history)
    if past is not None:
        past.keep_inputs(x)
    u = _masked(u, mask)
    delta, delta_bias, B, C = _operands(mixer, u, old)
    A = -torch.exp(mixer.A_log.float())
    y = ops.selective_scan(
        u, delta, A, B, C, mixer.D, z=z, delta_bias=delta_bias, delta_softplus=True, initial_state=state, return_final_state=past is not None
    )
    if past is not None:
        y, state = y
        past.keep_state(state)
    return project(y.to(dtype), mixer.out_proj)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else (x * mask).to(x.dtype)


def _operands(mixer: nn.Module, u: Tensor, old: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """delta (b, l, d), its bias or None, B and C (b, l, n)."""
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    dt_raw, B, C = project(u, mixer.x_proj).split(sizes, dim=-1)
    if hasattr(mixer, "dt_layernorm"):  # Jamba, and FalconMamba from 5.16
        dt_raw, B, C = mixer.dt_layernorm(dt_raw), mixer.b_layernorm(B), mixer.c_layernorm(C)
    elif hasattr(mixer, "rms_eps"):  # FalconMamba before: norms without weights
        dt_raw, B, C = (F.rms_norm(t.float(), t.shape[-1:], eps=mixer.rms_eps).to(t.dtype) for t in (dt_raw, B, C))
    dt_proj = mixer.dt_proj
    if old:
        return project(dt_raw, dt_proj), None, B, C
    if hasattr(mixer.config, "_is_quantized"):  # the weight is packed: only the module can multiply with it
        return dt_proj(dt_raw) - dt_proj.bias, dt_proj.bias, B, C
    return project(dt_raw, dt_proj, bias=False), dt_proj.bias, B, C


def _past(mixer: nn.Module, cache, length: int, old: bool, cache_position: Tensor | None) -> _Past:
    if not hasattr(cache, "ssm_states"):
        return _LayerPast(cache, mixer.layer_idx, mixer.conv_kernel_size, carry_state=old or length == 1)
    if cache_position is not None:  # Mamba and FalconMamba mark a prefill by a position for each tap
        fresh = length > 1 or cache_position.shape[0] == mixer.conv_kernel_size
    else:
        fresh = length > 1 or not getattr(cache, "has_previous_state", True)
    return _FlatPast(cache, mixer.layer_idx, mixer.conv_kernel_size, fresh)


class _Past(ABC):
    """What one mixer finds in a cache before a call and leaves there after it."""

    def __init__(self, cache, layer_idx: int, taps: int):
        self.cache, self.layer_idx, self.taps = cache, layer_idx, taps

    @abstractmethod
    def read(self) -> tuple[Tensor | None, Tensor | None]:
        """The w - 1 inputs before the first (b, d, w - 1) and the state (b, d, n), as copies, for the cache is written in place; or None."""

    @abstractmethod
    def keep_inputs(self, x: Tensor) -> None:
        """Leave the inputs x (b, l, d) of the convolution."""

    @abstractmethod
    def keep_state(self, state: Tensor) -> None:
        """Leave the state after the last token (b, d, n)."""

    def _history(self, conv_state: Tensor) -> Tensor:
        return conv_state[..., conv_state.shape[-1] - (self.taps - 1) :].clone()

    def _last_inputs(self, x: Tensor) -> Tensor:
        """The last w inputs (b, d, w), zeros before a shorter sequence; a negative pad crops."""
        return F.pad(x.transpose(1, 2), (self.taps - x.shape[1], 0))


class _LayerPast(_Past):
    """A ``Cache`` of layers, each with conv_states and recurrent_states, by state index in a dict since 5.12 or so, bare before."""

    def __init__(self, cache, layer_idx: int, taps: int, carry_state: bool):
        super().__init__(cache, layer_idx, taps)
        self.layer, self.carry_state = cache.layers[layer_idx], carry_state
        self.started = bool(_first(self.layer.has_previous_state))
        self.recording = getattr(self.layer, "record_past", False)

    def read(self):
        if not self.started:
            return None, None
        state = _first(self.layer.recurrent_states).clone() if self.carry_state else None
        return self._history(_first(self.layer.conv_states)), state

    def keep_inputs(self, x):
        # A layer that records its past wants every input; one without a past takes its size from what it gets first.
        whole = self.started or self.recording
        inputs = x.transpose(1, 2) if whole else self._last_inputs(x)
        self.cache.update_conv_state(inputs, self.layer_idx, conv_kernel_size=self.taps)

    def keep_state(self, state):
        self.cache.update_recurrent_state(state, self.layer_idx)


class _FlatPast(_Past):
    """MambaCache, FalconMambaCache, HybridMambaAttentionDynamicCache: conv_states (b, d, w) and ssm_states (b, d, n) by layer."""

    def __init__(self, cache, layer_idx: int, taps: int, fresh: bool):
        super().__init__(cache, layer_idx, taps)
        self.fresh = fresh

    def read(self):
        history = None if self.fresh else self._history(self.cache.conv_states[self.layer_idx])
        return history, self.cache.ssm_states[self.layer_idx].clone()

    def keep_inputs(self, x):
        old = self.cache.conv_states[self.layer_idx]
        inputs = self._last_inputs(x) if self.fresh else torch.cat([old[..., 1:], x.transpose(1, 2).to(old.dtype)], -1)
        old.copy_(inputs)

    def keep_state(self, state):
        self.cache.ssm_states[self.layer_idx].copy_(state)


def _first(states):
    """The layer's first state: of a dict by index, or itself."""
    return states[0] if isinstance(states, dict) else states
