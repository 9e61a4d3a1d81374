"""STORM's temporal projector in plain PyTorch (arXiv 2503.04130, eqs. 3, 5-8; docs/spec.md): downsample,
mixers, reduction; the truth that the fused one is compared with, and whose parameters it inherits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..profiling import stage
from ..tokens import TokenGrid, TokenReduction, described, integer, positive_int, reducing
from .functions import reduce_tokens
from .mixer import MixerLayer, ReferenceMixer, check_input

# The layers and the reduction, as ReferenceTemporalProjector.mix.
Mix = Callable[[Tensor, TokenGrid | None, TokenReduction | None, Tensor | None], Tensor]


class ReferenceTemporalProjector(nn.Module):
    """STORM's projector (docs/spec.md, Projector).

    A 2x2 downsample, a linear layer, M bidirectional mixers over the tokens of all frames, the token
    reduction.

    Args:
        vision_width: Dv, the width of the image encoder's tokens.
        d_model: D, the language model's width.
        layers: M, the number of mixers; 1 by default, 0 for none.
        bidirectional: False for the streaming, forward-only form; True by default.
        device: of the parameters; None for torch's default.
        dtype: of the parameters that do not stay float32; None for torch's default.
        mixer_options: further arguments of the mixer: d_state, d_conv, expand, dt_rank, ...

    Raises:
        TypeError: a width that is no integer, an option that there is not; named.
        ValueError: a width that is not positive, negative ``layers``, or as the mixer; named.

    Source:
        STORM, arXiv 2503.04130, eqs. 3 and 5-8.

    Example:
        >>> projector = ReferenceTemporalProjector(vision_width=8, d_model=16, d_state=4)
        >>> projector(torch.randn(1, 4, 6, 6, 8), TokenReduction(spatial_pool=3)).shape  # 4 tokens of 36
        torch.Size([1, 4, 16])
    """

    mixer_class: type[ReferenceMixer] = ReferenceMixer

    def __init__(
        self,
        vision_width: int,
        d_model: int,
        layers: int = 1,
        bidirectional: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **mixer_options: Any,
    ) -> None:
        super().__init__()
        vision_width, d_model, layers = (
            positive_int("vision_width", vision_width),
            positive_int("d_model", d_model),
            integer("layers", layers),
        )
        if layers < 0:
            raise ValueError(f"layers must be at least 0, got {described(layers)}")
        self._know(mixer_options)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.proj = nn.Linear(4 * vision_width, d_model, **factory)
        mixers = (
            self.mixer_class(d_model, bidirectional=bidirectional, **mixer_options, **factory) for _ in range(layers)
        )
        self.layers = nn.ModuleList(MixerLayer(mixer, **factory) for mixer in mixers)

    @classmethod
    def _know(cls, mixer_options: dict[str, object]) -> None:
        """Raise unless the mixer has these options."""
        own = inspect.signature(ReferenceTemporalProjector.__init__).parameters
        of_mixer = inspect.signature(cls.mixer_class.__init__).parameters
        known = [n for n, p in (own | of_mixer).items() if n != "self" and p.kind is not p.VAR_KEYWORD]
        unknown = next((option for option in mixer_options if option not in known), None)
        if unknown is not None and all(p.kind is not p.VAR_KEYWORD for p in of_mixer.values()):
            raise TypeError(f"{cls.__name__} has no option {described(unknown)}; its options are {', '.join(known)}")

    def forward(
        self,
        features: Tensor,
        reduction: TokenReduction | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        packed: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """The language model's tokens of videos.

        Args:
            features: (batch, T, h, w, vision_width), the image encoder's tokens, a floating-point dtype.
            reduction: how tokens are averaged and sampled; None, the default, for all tokens.
            lengths: (batch,) integers, a list, an array or a tensor: each video's number of frames where the batch is
                padded at the end. Each then comes out as if it ran alone, followed by zeros. None: T frames each.
            packed: (videos,) integers: each video's number of frames where the videos follow one another in a batch
                of 1. Their tokens then do so too, each video's as if it ran alone. None: one video a row.

        Returns:
            (batch, tokens, D), in the dtype that features and weights share.

        Raises:
            TypeError: an argument of the wrong type or dtype, named.
            ValueError: an argument of the wrong shape, numbers of frames that do not fit; named.
        """
        reduction = reducing(reduction)
        tokens, grid = self.embed(features)
        if packed is None:
            return run_padded(self.mix, tokens, grid, reduction, lengths)
        if lengths is not None:
            raise ValueError("lengths and packed cannot be combined: videos are padded or follow one another")
        return torch.cat(_mix_packed(self.mix, tokens, packed_grids(tokens, grid, packed), reduction), 1)

    def embed(self, features: Tensor) -> tuple[Tensor, TokenGrid]:
        """Downsample and project: (batch, T, h, w, vision_width) -> (batch, T*H*W, D) and its grid (STORM eq. 3)."""
        check_input("features", features, ("batch", "frames", "height", "width"), self.proj, parts=4)
        with stage("downsample"):
            blocks = downsample(features)
            grid = TokenGrid(*blocks.shape[1:4])
            return self.mixer_class._project(blocks, self.proj).flatten(1, 3), grid

    def mix(
        self, x: Tensor, grid: TokenGrid | None, reduction: TokenReduction | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """The layers and the reduction: (batch, L, D) -> (batch, L', D).

        ``x`` holds the tokens of ``grid``, reduced by ``reduction``; packed videos, whose bounds are
        ``cu_seqlens``, are not reduced.
        """
        for layer in self.layers:
            x = layer(x, cu_seqlens=cu_seqlens)
        with stage("reduce"):
            return reduce_tokens(x, grid, reduction)


def downsample(features: Tensor) -> Tensor:
    """2x2 pixel shuffle (batch, T, h, w, c) -> (batch, T, ceil(h/2), ceil(w/2), 4c), row-major in
    the block, odd sides zero-padded at the end.
    """
    height, width = features.shape[2:4]
    padded = F.pad(features, (0, 0, 0, width % 2, 0, height % 2))
    return padded.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4).flatten(4, 6)


def run_padded(
    mix: Mix, x: Tensor, grid: TokenGrid, reduction: TokenReduction | None, lengths: Sequence[int] | Tensor | None
) -> Tensor:
    """Run ``mix`` over whole videos x (batch, T*N, D), or, with ``lengths`` in frames, over the
    valid tokens packed one after the other.
    """
    if lengths is None:
        return mix(x, grid, reduction, None)
    lengths = _frame_counts("lengths", lengths)
    if len(lengths) != x.shape[0]:
        raise ValueError(
            f"lengths must name one number of frames for each of the {x.shape[0]} videos, got {len(lengths)}"
        )
    for i, frames in enumerate(lengths):
        if not 1 <= frames <= grid.frames:
            raise ValueError(
                f"lengths must be between 1 and {grid.frames}, the frames of the batch, "
                f"got {described(frames)} for lengths[{i}]"
            )
    grids = [TokenGrid(n, grid.height, grid.width) for n in lengths]
    packed = torch.cat([video[: own.tokens] for video, own in zip(x, grids, strict=True)])
    return nn.utils.rnn.pad_sequence(
        [video[0] for video in _mix_packed(mix, packed[None], grids, reduction)], batch_first=True
    )


def packed_grids(x: Tensor, grid: TokenGrid, packed: Sequence[int] | Tensor) -> list[TokenGrid]:
    """The grid of each video of x (1, L, D), whose ``packed`` frames make up ``grid`` together;
    raise, by name, where they do not.
    """
    lengths = _frame_counts("packed", packed)
    if x.shape[0] != 1:
        raise ValueError(f"with packed the batch must be 1, got {x.shape[0]}")
    grids = [TokenGrid(positive_int(f"packed[{i}]", n), grid.height, grid.width) for i, n in enumerate(lengths)]
    if sum(lengths) != grid.frames:
        raise ValueError(
            f"packed must add up to the {grid.frames} frames of features, got {sum(lengths)} in {len(lengths)} videos"
        )
    return grids


def _mix_packed(mix: Mix, x: Tensor, grids: list[TokenGrid], reduction: TokenReduction | None) -> list[Tensor]:
    """Run ``mix`` over videos one after the other, x (1, L, D) -> each video's reduced tokens (1,
    L', D). One alone is reduced by ``mix`` itself.
    """
    if len(grids) == 1:
        return [mix(x, grids[0], reduction, None)]
    tokens = [own.tokens for own in grids]
    bounds = torch.tensor([0, *tokens], dtype=torch.int64, device=x.device).cumsum(0)
    mixed = mix(x, None, None, bounds).split(tokens, 1)
    return [reduce_tokens(video, own, reduction) for video, own in zip(mixed, grids, strict=True)]


def _frame_counts(name: str, lengths: object) -> list[int]:
    """``lengths`` as a list of int, named ``name`` in errors. A tensor is read in one go: on a GPU
    each number would wait for the device.
    """
    values = lengths.tolist() if hasattr(lengths, "tolist") else lengths
    if not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence of integers, one a video, got {described(lengths)}")
    return [integer(f"{name}[{i}]", n) for i, n in enumerate(values)]
