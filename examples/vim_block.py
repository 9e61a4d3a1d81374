"""A bidirectional Vim block where mamba_ssm is not installed: the imports of Vim's own code resolve
to storm_kernels.
"""

import torch

from storm_kernels.interop import install

print(install())  # before the imports that it serves: the linter wants those first (E402)

from mamba_ssm.modules.mamba_simple import Mamba  # noqa: E402  after install(), which serves it
from mamba_ssm.ops.triton.layernorm import RMSNorm, rms_norm_fn  # noqa: E402  after install(), which serves it


class Block(torch.nn.Module):
    """Add, norm, mix: Vim's residual block."""

    def __init__(self, width):
        super().__init__()
        self.norm = RMSNorm(width)
        self.mixer = Mamba(width, bimamba_type="v2", if_divide_out=True)

    def forward(self, hidden, residual=None):
        hidden, residual = rms_norm_fn(
            hidden, self.norm.weight, self.norm.bias, residual, prenorm=True, eps=self.norm.eps
        )
        return self.mixer(hidden), residual


torch.manual_seed(0)
blocks = torch.nn.ModuleList(Block(192) for _ in range(2))
patches, residual = torch.randn(1, 197, 192), None  # a 224-pixel image in 16-pixel patches, and its class token
hidden = patches
for block in blocks:
    hidden, residual = block(hidden, residual)
(hidden + residual).square().mean().backward()
print(f"{tuple(hidden.shape)}, gradient of A_b_log {blocks[0].mixer.A_b_log.grad.norm():.2e}")
