"""Fused kernels for the temporal projector of STORM (arXiv 2503.04130): bidirectional selective
scan and token reduction.
"""

from . import reference
from .backends.dispatch import (
    BackendError,
    SlowPathWarning,
    set_default_backend,
    stats,
    strict,
    use_backend,
    why_not,
)
from .nn import BiMambaMixer, TemporalProjector
from .ops import (
    bidirectional_causal_conv1d,
    bidirectional_selective_scan,
    causal_conv1d,
    reduce_tokens,
    residual_layer_norm,
    selective_scan,
)
from .patch import PatchError, patch, patched, unpatch
from .reference import Direction
from .tokens import TokenGrid, TokenReduction

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "BiMambaMixer",
    "Direction",
    "PatchError",
    "SlowPathWarning",
    "TemporalProjector",
    "TokenGrid",
    "TokenReduction",
    "bidirectional_causal_conv1d",
    "bidirectional_selective_scan",
    "causal_conv1d",
    "patch",
    "patched",
    "reduce_tokens",
    "reference",
    "residual_layer_norm",
    "selective_scan",
    "set_default_backend",
    "stats",
    "strict",
    "unpatch",
    "use_backend",
    "why_not",
]
