"""Whether a prompt fits the language model, and what would make it fit; asked before anything is encoded."""

from __future__ import annotations

from torch import Tensor

from storm_kernels.tokens import TokenReduction

from .configuration_storm import StormConfig, checked_reduction

# The paper's reductions (Table 13), the mildest first.
_KNOWN = (
    TokenReduction(temporal_stride=2),
    TokenReduction(temporal_pool=4),
    TokenReduction(spatial_pool=2),
    TokenReduction(temporal_pool=4, temporal_stride=2),
    TokenReduction(temporal_pool=4, spatial_pool=2),
    TokenReduction(4, 2, 2),
)


def check_context(
    config: StormConfig,
    input_ids: Tensor,
    pixel_values_videos: Tensor | list[Tensor] | None = None,
    video_reductions: Tensor | None = None,
) -> None:
    """Raise where the prompt (batch, length) is longer than the context; the message names a reduction that would fit.

    Raises:
        ValueError: with the number of tokens, of which so many are of videos, and the context's.
    """
    length, limit = input_ids.shape[-1], config.context_length
    if length <= limit:
        return
    places = (input_ids == config.video_token_id).reshape(-1, length).sum(-1).tolist()
    row = max(range(len(places)), key=places.__getitem__)
    of_videos = places[row]
    videos = _videos_of(row, places, config, pixel_values_videos, video_reductions)
    raise ValueError(
        f"the prompt has {length} tokens, {of_videos} of them of videos, but the language model's context is {limit}; "
        + _advice(config, length - of_videos, videos, limit)
    )


def _videos_of(
    row: int, places: list[int], config: StormConfig, pixels: Tensor | list[Tensor] | None, reductions: Tensor | None
) -> list[int]:
    """Frames of each video whose placeholders are in prompt ``row`` of the batch: videos follow one another."""
    if pixels is None:
        return []
    frames = [len(pixels)] if isinstance(pixels, Tensor) and pixels.dim() == 4 else [len(video) for video in pixels]
    sizes = (
        [config.reduction] * len(frames) if reductions is None else [checked_reduction(*r) for r in reductions.tolist()]
    )
    before, chosen = sum(places[:row]), []
    for n, reduction in zip(frames, sizes, strict=False):
        if 0 <= -before < places[row]:
            chosen.append(n)
        before -= reduction.reduced(config.token_grid(n)).tokens
    return chosen


def _advice(config: StormConfig, of_text: int, videos: list[int], limit: int) -> str:
    if not videos:
        return "shorten it"
    for reduction in _KNOWN:
        tokens = of_text + sum(reduction.reduced(config.token_grid(frames)).tokens for frames in videos)
        if tokens <= limit:
            changed = {name: size for name, size in vars(reduction).items() if size > 1}
            chosen = ", ".join(f"{name}={size}" for name, size in changed.items())
            return f"{chosen} would make it {tokens}"
    return f"no reduction of the paper fits; take fewer than the {sum(videos)} frames"
