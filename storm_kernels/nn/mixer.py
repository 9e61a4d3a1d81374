"""The mixer, a drop-in for the reference's: the same parameters and state_dict, a faster forward.

What it does beside calling the kernels is docs/spec.md's algebra: reduction is linear, so with one
the scan writes only reduced y and out_proj runs on what survives; frames that sampling drops get no
gate. A module that is not plain (:mod:`storm_kernels.plain`) is called on every token and in the
reference's order: the reduction comes after an out_proj that may not be linear.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import bidirectional_selective_scan, reduce_tokens, selective_scan
from ..plain import is_plain
from ..profiling import stage
from ..reference import Direction, ReferenceMixer
from ..tokens import TokenGrid, TokenReduction
from .linear import convolve, convolve_both, linear, project, project_dt

# A traced program takes a grid or a reduction as it takes an integer: torch.export accepts them
# among the inputs.
for _kind in (TokenGrid, TokenReduction):
    torch.utils._pytree.register_constant(_kind)


class BiMambaMixer(ReferenceMixer):
    """:class:`storm_kernels.reference.ReferenceMixer` on the kernels: same arguments, parameters and results."""

    _project, _project_dt = staticmethod(project), staticmethod(project_dt)

    def forward(
        self,
        x: Tensor,
        grid: TokenGrid | None = None,
        reduction: TokenReduction | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """x (batch, L, D) -> (batch, L', D) in x's dtype; with a reduction, ``grid`` says where the tokens sit."""
        grid, reduction = self._checked(x, grid, reduction, cu_seqlens)
        if reduction is not None and cu_seqlens is None and not is_plain(self.out_proj):
            return reduce_tokens(BiMambaMixer.forward(self, x, cu_seqlens=cu_seqlens), grid, reduction)
        with stage("in_proj"):
            inner, z = self._in_proj(x, grid, reduction)
        with stage("conv"):
            convolved = self._conv(inner, cu_seqlens)
        directions = [self._direction(u, suffix) for u, suffix in zip(convolved, self.suffixes, strict=True)]
        with stage("scan"):
            y = self._fused_scan(directions, z, cu_seqlens, grid, reduction)
        with stage("out_proj"):
            return self._project(y, self.out_proj)

    def _in_proj(self, x: Tensor, grid: TokenGrid | None, reduction: TokenReduction | None) -> tuple[Tensor, Tensor]:
        """The scan's input for every token, the gate for the surviving frames' tokens only."""
        if reduction is None or not reduction.leaves_out(grid) or not is_plain(self.in_proj):
            return self._project(x, self.in_proj).chunk(2, dim=-1)
        kept = kept_tokens(x, grid, reduction)
        half = self.d_inner
        weight, bias = self.in_proj.weight, self.in_proj.bias
        inner = linear(x, weight[:half], None if bias is None else bias[:half])
        return inner, linear(kept, weight[half:], None if bias is None else bias[half:])

    def _conv(self, x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
        if not self.bidirectional:
            return (convolve(x, self.conv1d, cu_seqlens=cu_seqlens),)
        return convolve_both(x, self.conv1d, self.conv1d_b, cu_seqlens=cu_seqlens)

    def _fused_scan(
        self,
        directions: list[Direction],
        z: Tensor,
        cu_seqlens: Tensor | None,
        grid: TokenGrid | None,
        reduction: TokenReduction | None,
    ) -> Tensor:
        options = {"delta_softplus": True, "cu_seqlens": cu_seqlens, "grid": grid, "reduction": reduction}
        if not self.bidirectional:
            (one,) = directions
            return selective_scan(*one[:6], z=z, delta_bias=one.delta_bias, **options)
        y = bidirectional_selective_scan(*directions, z=z, **options)
        return y / 2 if self.if_divide_out else y


def kept_tokens(x: Tensor, grid: TokenGrid, reduction: TokenReduction) -> Tensor:
    """The tokens of the frames that survive: (batch, T*N, C) -> (batch, kept tokens, C), a copy of those rows."""
    frames = x.unflatten(1, (grid.frames, grid.tokens_per_frame))
    return frames.index_select(1, reduction.kept_index(grid, x.device)).flatten(1, 2)
