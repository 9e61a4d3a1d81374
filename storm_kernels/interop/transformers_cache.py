"""The caches that the mixers of transformers leave their states in: what a mixer reads there before
a call and writes after it.

Three kinds: a list of layers with conv_states and recurrent_states; one object with conv_states and
ssm_states by layer, with ``cache_position`` (Mamba, FalconMamba) or with ``has_previous_state``
(Jamba, Zamba). Nothing here imports transformers. Symbols: b batch, l tokens, d channels, n states,
w taps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def past(mixer: nn.Module, cache, length: int, old: bool, cache_position: Tensor | None) -> Past:
    """What ``mixer`` finds in ``cache`` before ``length`` tokens; ``old`` and ``cache_position`` as
    in :func:`.transformers.mixer_forward`.
    """
    if not hasattr(cache, "ssm_states"):
        return _LayerPast(mixer, cache, carry_state=old or length == 1)
    if cache_position is not None:  # Mamba and FalconMamba mark a prefill by a position for each tap
        fresh = length > 1 or cache_position.shape[0] == mixer.conv1d.weight.shape[-1]
    else:
        fresh = length > 1 or not getattr(cache, "has_previous_state", True)
    return _FlatPast(mixer, cache, fresh)


class Past(ABC):
    """One mixer's part of a cache. ``started``: whether tokens came before these."""

    started: bool

    def __init__(self, mixer: nn.Module, cache):
        self.cache, self.layer_idx, self.taps = cache, mixer.layer_idx, mixer.conv1d.weight.shape[-1]
        self.state_shape = mixer.A_log.shape  # (d, n), by head (heads, d / heads, n)

    @abstractmethod
    def read(self) -> tuple[Tensor | None, Tensor | None]:
        """The w - 1 inputs before the first (b, d, w - 1) and the state (b, d, n), as copies, for
        the cache is written in place; or None.
        """

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

    def _flat(self, state: Tensor) -> Tensor:
        """A copy of the cache's state as (b, d, n)."""
        return state.clone().flatten(1, -2)

    def _shaped(self, state: Tensor) -> Tensor:
        """The state (b, d, n) in the cache's shape."""
        return state.reshape(state.shape[0], *self.state_shape)


class _LayerPast(Past):
    """A ``Cache`` of layers, each with conv_states and recurrent_states, by state index in a dict
    since 5.12 or so, bare before.
    """

    def __init__(self, mixer: nn.Module, cache, carry_state: bool):
        super().__init__(mixer, cache)
        self.layer, self.carry_state = cache.layers[self.layer_idx], carry_state
        self.started = bool(_first(self.layer.has_previous_state))
        self.recording = getattr(self.layer, "record_past", False)

    def read(self):
        if not self.started:
            return None, None
        state = self._flat(_first(self.layer.recurrent_states)) if self.carry_state else None
        return self._history(_first(self.layer.conv_states)), state

    def keep_inputs(self, x):
        # A layer that records its past wants every input; one without a past takes its size from
        # what it gets first.
        whole = self.started or self.recording
        inputs = x.transpose(1, 2) if whole else self._last_inputs(x)
        self.cache.update_conv_state(inputs, self.layer_idx, conv_kernel_size=self.taps)

    def keep_state(self, state):
        self.cache.update_recurrent_state(self._shaped(state), self.layer_idx)


class _FlatPast(Past):
    """MambaCache, FalconMambaCache and the hybrid caches of Jamba and Zamba: conv_states (b, d, w)
    and ssm_states (b, d, n) by layer.
    """

    def __init__(self, mixer: nn.Module, cache, fresh: bool):
        super().__init__(mixer, cache)
        self.started = not fresh

    def read(self):
        history = self._history(self.cache.conv_states[self.layer_idx]) if self.started else None
        return history, self._flat(self.cache.ssm_states[self.layer_idx])

    def keep_inputs(self, x):
        old = self.cache.conv_states[self.layer_idx]
        inputs = (
            torch.cat([old[..., 1:], x.transpose(1, 2).to(old.dtype)], -1) if self.started else self._last_inputs(x)
        )
        old.copy_(inputs)
        # MambaCache of 5.4 tells by itself, after its last layer, that there is a past; other
        # caches are told by the model.
        if (
            hasattr(self.cache, "update_conv_state")
            and self.layer_idx == len(self.cache.conv_states) - 1
            and hasattr(self.cache, "has_previous_state")
        ):
            self.cache.has_previous_state = True

    def keep_state(self, state):
        self.cache.ssm_states[self.layer_idx].copy_(self._shaped(state))


def _first(states):
    """The layer's first state: of a dict by index, or itself."""
    return states[0] if isinstance(states, dict) else states
