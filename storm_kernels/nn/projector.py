"""STORM's projector, a drop-in for the reference's: the same parameters and state_dict, a faster forward.

Reduction is linear, so the last layer's mixer is asked for reduced tokens (docs/spec.md, the
algebra). Where a hook or another forward has to see all of them (:mod:`storm_kernels.plain`), the
layer is called on every token and the reduction follows.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..ops import reduce_tokens
from ..plain import has_hooks, runs_its_forward_only
from ..profiling import stage
from ..reference import MixerLayer, ReferenceTemporalProjector
from ..tokens import TokenGrid, TokenReduction
from .mixer import BiMambaMixer


class TemporalProjector(ReferenceTemporalProjector):
    """:class:`storm_kernels.reference.ReferenceTemporalProjector` on the kernels: same arguments,
    parameters and results.
    """

    mixer_class = BiMambaMixer

    def mix(
        self, x: Tensor, grid: TokenGrid | None, reduction: TokenReduction | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """The layers and the reduction; the last layer writes reduced tokens only: ``reduce(X) +
        Mixer(LayerNorm(X), reduction)``.
        """
        *others, last = self.layers or (None,)
        reduces = last is not None and reduction is not None and not reduction.is_identity and _reduces(last)
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
    """Whether the layer may be left out and its mixer asked for reduced tokens: both do what their
    classes do, and nothing else.
    """
    if type(layer) is not MixerLayer or not runs_its_forward_only(layer) or has_hooks(layer.mixer):
        return False
    mixer = getattr(layer.mixer, "_orig_mod", layer.mixer)  # of torch.compile(mixer)
    return type(mixer).forward is BiMambaMixer.forward and runs_its_forward_only(mixer)
