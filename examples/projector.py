"""STORM's temporal projector: 32 frames of image tokens in, an eighth of the tokens out; the
reference model, patched, gives the same.
"""

import torch

from storm_kernels import TokenReduction
from storm_kernels.interop.patching import patch
from storm_kernels.reference import ReferenceTemporalProjector

torch.manual_seed(0)
projector = ReferenceTemporalProjector(vision_width=64, d_model=96, layers=1)
frames = torch.randn(1, 32, 8, 8, 64)  # (batch, frames, height, width, vision width)
reduction = TokenReduction(temporal_pool=4, temporal_stride=2)  # average 4 frames, keep every second average

with torch.no_grad():
    expected = projector(frames, reduction)
    print(patch(projector))
    tokens = projector(frames, reduction)

assert (tokens - expected).abs().max() < 1e-4
print(f"{32 * 4 * 4} tokens after the downsampling, {tokens.shape[1]} to the language model")
