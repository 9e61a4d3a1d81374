"""The truth in plain PyTorch: each public function under its own name, and the reference projector."""

from .functions import (
    Direction,
    bidirectional_causal_conv1d,
    bidirectional_selective_scan,
    causal_conv1d,
    reduce_tokens,
    selective_scan,
)
from .mixer import MixerLayer, ReferenceMixer
from .projector import ReferenceTemporalProjector

__all__ = [
    "Direction",
    "MixerLayer",
    "ReferenceMixer",
    "ReferenceTemporalProjector",
    "bidirectional_causal_conv1d",
    "bidirectional_selective_scan",
    "causal_conv1d",
    "reduce_tokens",
    "selective_scan",
]
