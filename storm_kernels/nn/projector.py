"""STORM's projector, a drop-in for the reference's: the same parameters and state_dict, a faster forward.

Reduction is linear, so the last layer's mixer is asked for reduced tokens (docs/spec.md, the
algebra). Where a hook or another forward has to see all of them (:mod:`storm_kernels.plain`), the
layer is called on every token and the reduction follows.
"""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor, nn

from ..ops import reduce_tokens
from ..plain import has_hooks, runs_its_forward_only
from ..profiling import stage
from ..reference import MixerLayer, ReferenceTemporalProjector
from ..tokens import TokenGrid, TokenReduction
from .mixer import BiMambaMixer
from .stream import ProjectorStream


class TemporalProjector(ReferenceTemporalProjector):
    """:class:`storm_kernels.reference.ReferenceTemporalProjector` on the kernels: same arguments and results.

    The parameters are the same too, so a ``state_dict`` of either loads into the other.

    Example:
        >>> import torch
        >>> from storm_kernels import TemporalProjector, TokenReduction
        >>> projector = TemporalProjector(vision_width=8, d_model=16, layers=2)
        >>> features = torch.randn(1, 4, 6, 6, 8)  # batch, frames, height, width, channels
        >>> projector(features, TokenReduction(temporal_pool=4)).shape  # 9 tokens of 36
        torch.Size([1, 9, 16])
    """

    mixer_class = BiMambaMixer

    @property
    def channel_block(self) -> int | str | None:
        """:attr:`BiMambaMixer.channel_block` of all layers; None too where they have none, or differ.

        Example:
            >>> import torch
            >>> from storm_kernels import TemporalProjector
            >>> projector = TemporalProjector(vision_width=8, d_model=64)
            >>> projector.channel_block = 32
            >>> projector(torch.randn(1, 4, 6, 6, 8)).shape
            torch.Size([1, 36, 64])
        """
        blocks = {mixer.channel_block for mixer in self._mixers()}
        return blocks.pop() if len(blocks) == 1 else None

    @channel_block.setter
    def channel_block(self, value: int | str | None) -> None:
        for mixer in self._mixers():
            mixer.channel_block = value

    def _mixers(self) -> list[BiMambaMixer]:
        mixers = (getattr(layer, "mixer", None) for layer in self.layers)
        return [mixer for mixer in mixers if isinstance(mixer, BiMambaMixer)]

    def stream(
        self, height: int, width: int, reduction: TokenReduction | None = None, batch: int = 1
    ) -> ProjectorStream:
        """Run a forward-only projector frame by frame, in memory and time that do not grow with the video.

        All tokens together, of any pushes and ``finish``, are those of the whole video. No gradients.

        Args:
            height: h of the features, the image encoder's tokens of a column.
            width: w of the features, its tokens of a row.
            reduction: how tokens are averaged and sampled; None, the default, for all tokens.
            batch: the number of videos that run in step; 1 by default.

        Returns:
            A stream: ``push(features)`` gives the tokens that are final, ``finish()`` the last ones;
            ``state_dict`` and ``load_state_dict`` let it outlive its process.

        Raises:
            TypeError: an argument of the wrong type, named.
            ValueError: a bidirectional projector, a layer with hooks or of another class, a size that is not positive.

        Example:
            >>> import torch
            >>> camera = TemporalProjector(vision_width=8, d_model=16, bidirectional=False).stream(6, 6)
            >>> camera.push(torch.randn(1, 1, 6, 6, 8)).shape
            torch.Size([1, 9, 16])
        """
        return ProjectorStream(self, height, width, reduction, batch)

    def mix(
        self, x: Tensor, grid: TokenGrid | None, reduction: TokenReduction | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """The layers and the reduction: (batch, L, D) -> (batch, L', D).

        The last layer writes reduced tokens only: ``reduce(X) + Mixer(LayerNorm(X), reduction)``.
        ``x``, ``grid``, ``reduction`` and ``cu_seqlens`` are the reference's.
        """
        layers = list(self.layers)
        last = layers.pop() if layers and reduction is not None and not reduction.is_identity else None
        if last is None or not _reduces(last):
            for layer in self.layers:
                x = layer(x, cu_seqlens=cu_seqlens)
            with stage("reduce"):
                return reduce_tokens(x, grid, reduction)
        for layer in layers:
            x = layer(x, cu_seqlens=cu_seqlens)
        with stage("norm"):
            normed = last.norm(x)
        with stage("reduce"):
            x = reduce_tokens(x, grid, reduction)
        out: Tensor = x + last.mixer(normed, grid, reduction)
        return out


def _reduces(layer: nn.Module) -> TypeGuard[MixerLayer]:
    """Whether the layer may be left out and its mixer asked for reduced tokens: both do what their
    classes do, and nothing else.
    """
    if type(layer) is not MixerLayer or not runs_its_forward_only(layer) or has_hooks(layer.mixer):
        return False
    mixer = getattr(layer.mixer, "_orig_mod", layer.mixer)  # of torch.compile(mixer)
    return type(mixer).forward is BiMambaMixer.forward and runs_its_forward_only(mixer)
