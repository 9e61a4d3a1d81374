"""Drop-ins for the reference mixer and projector: the same parameters and state_dict, a faster forward.

What they do beside calling the kernels is SPEC.md's algebra: reduction is linear, so in the last layer the scan writes only reduced y and out_proj
runs on what survives; frames that sampling drops get no gate. A module that is not plain (:mod:`storm_kernels.plain`) is called on every token and
in the reference's order: the reduction comes after an out_proj that may not be linear, and after a layer with hooks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .linear import convolve, convolve_both, linear, project, project_dt
from .ops import bidirectional_selective_scan, reduce_tokens, selective_scan
from .plain import has_hooks, is_plain, runs_its_forward_only
from .profiling import stage
from .reference import Direction, MixerLayer, ReferenceMixer, ReferenceTemporalProjector
from .tokens import TokenGrid, TokenReduction

# A traced program takes a grid or a reduction as it takes an integer: torch.export accepts them among the inputs.
for _kind in (TokenGrid, TokenReduction):
    torch.utils._pytree.register_constant(_kind)


class BiMambaMixer(ReferenceMixer):
    """:class:`storm_kernels.reference.ReferenceMixer` on the kernels: same arguments, parameters and results."""

    _project, _project_dt = staticmethod(project), staticmethod(project_dt)

    def forward(self, x: Tensor, grid: TokenGrid | None = None, reduction: TokenReduction | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """x (batch, L, D) -> (batch, L', D) in x's dtype; with a reduction, ``grid`` says where the tokens sit."""
        if reduction is not None and reduction.is_identity:
            grid = reduction = None
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
        if reduction is None or reduction.temporal_stride == 1 or not is_plain(self.in_proj):
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
        self, directions: list[Direction], z: Tensor, cu_seqlens: Tensor | None, grid: TokenGrid | None, reduction: TokenReduction | None
    ) -> Tensor:
        options = {"delta_softplus": True, "cu_seqlens": cu_seqlens, "grid": grid, "reduction": reduction}
        if not self.bidirectional:
            (one,) = directions
            return selective_scan(*one[:6], z=z, delta_bias=one.delta_bias, **options)
        y = bidirectional_selective_scan(*directions, z=z, **options)
        return y / 2 if self.if_divide_out else y


class TemporalProjector(ReferenceTemporalProjector):
    """:class:`storm_kernels.reference.ReferenceTemporalProjector` on the kernels: same arguments, parameters and results."""

    mixer_class = BiMambaMixer

    def mix(self, x: Tensor, grid: TokenGrid | None, reduction: TokenReduction, cu_seqlens: Tensor | None) -> Tensor:
        """The layers and the reduction; the last layer writes reduced tokens only: ``reduce(X) + Mixer(LayerNorm(X), reduction)``."""
        *others, last = self.layers or (None,)
        reduces = last is not None and not reduction.is_identity and _reduces(last)
        for layer in others if reduces else self.layers:
            x = layer(x, cu_seqlens=cu_seqlens)
        if not reduces:
            with stage("reduce"):
                return reduce_tokens(x, grid, reduction)
        with stage("norm"):
            normed = last.norm(x)
        with stage("reduce"):
            x = reduce_tokens(x, grid, reduction)
        return x + last.mixer(normed, grid, reduction)


def _reduces(layer: nn.Module) -> bool:
    """Whether the layer may be left out and its mixer asked for reduced tokens: both do what their classes do, and nothing else."""
    if type(layer) is not MixerLayer or not runs_its_forward_only(layer) or has_hooks(layer.mixer):
        return False
    mixer = getattr(layer.mixer, "_orig_mod", layer.mixer)  # of torch.compile(mixer)
    return type(mixer).forward is BiMambaMixer.forward and runs_its_forward_only(mixer)


def kept_tokens(x: Tensor, grid: TokenGrid, reduction: TokenReduction) -> Tensor:
    """The tokens of the frames that survive: (batch, T*N, C) -> (batch, kept tokens, C), a copy of those rows."""
    pool, period = reduction.temporal_pool, reduction.temporal_pool * reduction.temporal_stride
    frames = x.unflatten(1, (grid.frames, grid.tokens_per_frame))
    full, rest = divmod(grid.frames, period)
    whole = frames[:, : full * period].unflatten(1, (full, period))[:, :, :pool].flatten(1, 3)
    if rest == 0:
        return whole
    last = frames[:, full * period : full * period + min(pool, rest)].flatten(1, 2)
    return torch.cat([whole, last], 1)
