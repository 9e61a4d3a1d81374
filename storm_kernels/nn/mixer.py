"""The mixer, a drop-in for the reference's: the same parameters and state_dict, a faster forward.

What it does beside calling the kernels is docs/spec.md's algebra: reduction is linear, so with one
the scan writes only reduced y and out_proj runs on what survives; frames that sampling drops get no
gate. A module that is not plain (:mod:`storm_kernels.plain`) is called on every token and in the
reference's order: the reduction comes after an out_proj that may not be linear.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import reduce_tokens
from ..plain import is_plain
from ..profiling import stage
from ..reference import ReferenceMixer
from ..reference.mixer import decay
from ..tokens import TokenGrid, TokenReduction
from .channels import mix_by_channels
from .core import Branch, mixer_core
from .linear import linear, project
from .memory import block_for, checked_block

# A traced program takes a grid or a reduction as it takes an integer: torch.export accepts them
# among the inputs.
for _kind in (TokenGrid, TokenReduction):
    torch.utils._pytree.register_constant(_kind)


class BiMambaMixer(ReferenceMixer):
    """:class:`storm_kernels.reference.ReferenceMixer` on the kernels: same arguments, parameters and results.

    Example:
        >>> from storm_kernels import BiMambaMixer, TokenGrid, TokenReduction
        >>> mixer = BiMambaMixer(d_model=8, d_state=4)
        >>> x = torch.randn(1, 12, 8)  # 3 frames of 2 x 2 tokens
        >>> mixer(x, TokenGrid(3, 2, 2), TokenReduction(temporal_pool=3)).shape
        torch.Size([1, 4, 8])
    """

    _project = staticmethod(project)
    _channel_block: int | str | None = "auto"

    @property
    def channel_block(self) -> int | str | None:
        """Channels that are worked through at a time, 1 to E: fewer need less memory. "auto", the default, is all of
        them where their memory is free, else as many as it serves; None is always all (docs/scaling.md).

        Example:
            >>> import torch
            >>> mixer = BiMambaMixer(d_model=64)
            >>> mixer.channel_block = 32  # of 128
            >>> mixer(torch.randn(1, 12, 64)).shape
            torch.Size([1, 12, 64])
        """
        return self._channel_block

    @channel_block.setter
    def channel_block(self, value: int | str | None) -> None:
        self._channel_block = checked_block(value, self.d_inner)

    def forward(
        self,
        x: Tensor,
        grid: TokenGrid | None = None,
        reduction: TokenReduction | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Mix x over its tokens, and reduce them where a reduction is given.

        Args:
            x: (batch, L, D), a floating-point dtype.
            grid: where the tokens sit; needed only with a reduction.
            reduction: how they are averaged and sampled; None for all tokens.
            cu_seqlens: (n + 1,) int32 or int64: bounds of sequences packed in a batch of 1; not with a reduction.

        Returns:
            (batch, L', D) in x's dtype.

        Raises:
            TypeError: an argument of the wrong type or dtype, named.
            ValueError: an argument of the wrong shape, a grid that does not hold the tokens; named.
        """
        grid, reduction = self._checked(x, grid, reduction, cu_seqlens)
        block = block_for(self, self._channel_block, x, grid, reduction)
        if block is not None:
            return mix_by_channels(self, x, block, (grid, reduction, cu_seqlens))
        if reduction is not None and cu_seqlens is None and not is_plain(self.out_proj):
            return reduce_tokens(BiMambaMixer.forward(self, x, cu_seqlens=cu_seqlens), grid, reduction)
        with stage("in_proj"):
            inner, z = self._in_proj(x, grid, reduction)
        y = mixer_core(inner, z, self._branches(), cu_seqlens=cu_seqlens, grid=grid, reduction=reduction)
        if self.bidirectional and self.if_divide_out:
            y = y / 2
        with stage("out_proj"):
            return self._project(y, self.out_proj)

    def _in_proj(self, x: Tensor, grid: TokenGrid | None, reduction: TokenReduction | None) -> tuple[Tensor, Tensor]:
        """The scan's input for every token, the gate for the surviving frames' tokens only."""
        if grid is None or reduction is None or not reduction.leaves_out(grid) or not is_plain(self.in_proj):
            inner, z = self._project(x, self.in_proj).chunk(2, dim=-1)
            return inner, z
        kept = kept_tokens(x, grid, reduction)
        half = self.d_inner
        weight, bias = self.in_proj.weight, self.in_proj.bias
        inner = linear(x, weight[:half], None if bias is None else bias[:half])
        return inner, linear(kept, weight[half:], None if bias is None else bias[half:])

    def _branches(self) -> list[Branch]:
        forward = Branch(self.conv1d, self.x_proj, self.dt_proj, decay(self.A_log), self.D)
        if not self.bidirectional:
            return [forward]
        return [forward, Branch(self.conv1d_b, self.x_proj_b, self.dt_proj_b, decay(self.A_b_log), self.D_b)]


def kept_tokens(x: Tensor, grid: TokenGrid, reduction: TokenReduction) -> Tensor:
    """The tokens of the frames that survive: (batch, T*N, C) -> (batch, kept tokens, C), a copy of those rows."""
    frames = x.unflatten(1, (grid.frames, grid.tokens_per_frame))
    return frames.index_select(1, reduction.kept_index(grid, x.device)).flatten(1, 2)
