"""Fused kernels for the temporal projector of STORM (arXiv 2503.04130).

TemporalProjector, BiMambaMixer                STORM's projector and its mixer, modules on the kernels
TokenGrid, TokenReduction                      where a video's tokens sit; which of them survive
selective_scan, Direction                      Mamba-1's scan, gated and reduced; one direction's operands
bidirectional_selective_scan                   both directions of it in one launch
causal_conv1d, bidirectional_causal_conv1d     the depthwise convolution before a scan, in one or both orders
reduce_tokens                                  the token reduction by itself
reference                                      the plain-PyTorch twin of each, under the same name
patch, unpatch, patched, PatchError            the mixers that a model has already, on the kernels and back
use_backend, set_default_backend               who runs: "cpu", "cuda", "triton" or "torch" (plain PyTorch)
why_not, BackendError, stats                   why a backend cannot run something; what has run where
strict, SlowPathWarning                        a silent fall to plain PyTorch as an error, or as a warning
interop, verify, profiling                     mamba_ssm's calls; every backend checked; where the time goes

Example:
    >>> import torch
    >>> from storm_kernels import TemporalProjector, TokenReduction
    >>> projector = TemporalProjector(vision_width=8, d_model=16)
    >>> features = torch.randn(1, 4, 6, 6, 8)  # batch, frames, height, width, channels
    >>> projector(features, TokenReduction(temporal_pool=4)).shape  # 9 tokens of 36
    torch.Size([1, 9, 16])
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
    "selective_scan",
    "set_default_backend",
    "stats",
    "strict",
    "unpatch",
    "use_backend",
    "why_not",
]
