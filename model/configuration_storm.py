"""What a video-language model of STORM's or VILA's kind is, as a transformers configuration."""

from __future__ import annotations

import sys
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from storm_kernels.tokens import TokenGrid, TokenReduction, described, integer, positive_int

PROJECTOR_TYPES = ("storm", "vila")
PROJECTOR_IMPLEMENTATIONS = ("fused", "reference")
# Far past the paper's 512 frames and 4 x 2 x 2 reduction; what is larger is a slip of the keyboard,
# and an error before anything is allocated.
MAX_FRAMES = 65_536
MAX_REDUCTION = 65_536


class StormConfig(PreTrainedConfig):
    """A SigLIP tower, a projector and a causal language model, as a transformers configuration.

    Args:
        vision_config: of a SigLIP tower of fixed resolution ("siglip_vision_model", or "siglip", whose text half is
            left out), or the dictionary of one. ``num_hidden_layers`` counts the layers that are kept: the projector
            reads the last one's output, before the final norm. VILA reads the last but one of the published tower.
            None for that class's defaults.
        text_config: of any causal language model of transformers, or the dictionary of one; None for Qwen2's defaults.
        projector_type: "storm", which mixes over time and is the default, or "vila", which does not.
        projector_layers: M, the mixers of "storm"; 4 by default.
        projector_state: S of each mixer; 16 by default.
        projector_conv: K of each mixer, taps in tokens; 4 by default.
        projector_expand: E / D of each mixer; 2 by default.
        projector_bidirectional: False for the streaming, forward-only form; True by default.
        projector_implementation: "fused", the kernels and the default, or "reference", plain PyTorch; the same weights
            and results.
        temporal_pool: k in frames, where a call chooses none; 1 by default.
        spatial_pool: p in tokens a side, where a call chooses none; 1 by default.
        temporal_stride: s in pooled frames, where a call chooses none; 1 by default.
        image_token_id: the placeholder of images in the prompt; 0 by default.
        video_token_id: the placeholder of videos in the prompt; 1 by default.
        random_parts: parts whose weights are random still ("projector"), which is said wherever the model is loaded;
            None for none.
        tie_word_embeddings: the language model's; what is given here does not count.

    Raises:
        TypeError: a field of the wrong type, named.
        ValueError: a field out of range, named.

    Source:
        STORM, arXiv 2503.04130; VILA, arXiv 2412.04468.

    Example:
        >>> StormConfig(projector_layers=2, temporal_pool=4).reduction
        TokenReduction(temporal_pool=4, spatial_pool=1, temporal_stride=1)
    """

    model_type = "storm"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: Any = None  # once made, a PreTrainedConfig
    text_config: Any = None
    projector_type: str = "storm"
    projector_layers: int = 4
    projector_state: int = 16
    projector_conv: int = 4
    projector_expand: int | float = 2
    projector_bidirectional: bool = True
    projector_implementation: str = "fused"
    temporal_pool: int = 1
    spatial_pool: int = 1
    temporal_stride: int = 1
    image_token_id: int = 0
    video_token_id: int = 1
    random_parts: list[str] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = _vision_config(self.vision_config)
        self.text_config = _sub_config("text_config", self.text_config, "qwen2")
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        _one_of("projector_type", self.projector_type, PROJECTOR_TYPES)
        _one_of("projector_implementation", self.projector_implementation, PROJECTOR_IMPLEMENTATIONS)
        for name in ("projector_layers", "projector_state", "projector_conv"):
            positive_int(name, getattr(self, name))
        checked_reduction(self.temporal_pool, self.spatial_pool, self.temporal_stride)
        self._check_placeholders()
        super().__post_init__(**kwargs)

    def _check_placeholders(self) -> None:
        """The placeholders are two tokens that the language model has."""
        for name in ("image_token_id", "video_token_id"):
            number = integer(name, getattr(self, name))
            if not 0 <= number < self.text_config.vocab_size:
                raise ValueError(
                    f"{name} must be a token of text_config, 0 to {self.text_config.vocab_size - 1}, got {number}"
                )
        if self.image_token_id == self.video_token_id:
            raise ValueError(
                f"image_token_id and video_token_id must be two tokens, got {self.image_token_id} for both"
            )

    @property
    def reduction(self) -> TokenReduction:
        """The token reduction where a call chooses none."""
        return TokenReduction(self.temporal_pool, self.spatial_pool, self.temporal_stride)

    def token_grid(self, frames: int) -> TokenGrid:
        """Tokens of ``frames`` frames after the 2x2 downsample (odd sides are padded), before the reduction."""
        return token_grid(frames, self.vision_config.image_size, self.vision_config.patch_size)

    @property
    def context_length(self) -> int:
        """Tokens that the language model can read, rope scaling included; one without positions has no end."""
        limit = getattr(self.text_config, "max_position_embeddings", None)
        if limit is None:
            return sys.maxsize
        rope = getattr(self.text_config, "rope_parameters", None) or {}
        trained = rope.get("original_max_position_embeddings") or limit
        return max(limit, int(trained * (rope.get("factor") or 1)))


def token_grid(frames: int, image_size: int, patch_size: int) -> TokenGrid:
    """Tokens of ``frames`` frames of ``image_size`` x ``image_size`` pixels after the 2x2 downsample."""
    side = -(-(image_size // patch_size) // 2)
    return TokenGrid(check_frames(frames), side, side)


def checked_reduction(temporal_pool: int, spatial_pool: int, temporal_stride: int) -> TokenReduction:
    """The reduction of these sizes; a ValueError names one that is out of range."""
    reduction = TokenReduction(temporal_pool, spatial_pool, temporal_stride)
    for name in ("temporal_pool", "spatial_pool", "temporal_stride"):
        if getattr(reduction, name) > MAX_REDUCTION:
            raise ValueError(f"{name} must be at most {MAX_REDUCTION}, got {getattr(reduction, name)}")
    return reduction


def check_frames(frames: object) -> int:
    """``frames`` if it is an integer from 1 to MAX_FRAMES; otherwise an error with its value."""
    frames = positive_int("frames", frames)
    if frames > MAX_FRAMES:
        raise ValueError(f"frames must be at most {MAX_FRAMES}, got {frames}")
    return frames


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {described(value)}")


def _sub_config(name: str, given: object, default: str) -> PreTrainedConfig:
    if isinstance(given, PreTrainedConfig):
        return given
    if given is not None and not isinstance(given, dict):
        raise TypeError(f"{name} must be a configuration or a dictionary, got {described(given)}")
    content = dict(given or {})
    model_type = content.pop("model_type", default)
    return AutoConfig.for_model(model_type, **content)


def _vision_config(given: object) -> PreTrainedConfig:
    """The tower's configuration, without a pooling head; raise unless it is a SigLIP tower of fixed resolution."""
    config = _sub_config("vision_config", given, "siglip_vision_model")
    if config.model_type == "siglip":
        config = config.vision_config
    if config.model_type != "siglip_vision_model":
        raise ValueError(
            f"vision_config must be of a SigLIP or SigLIP2 tower of fixed resolution (siglip, siglip_vision_model), "
            f"got model_type {config.model_type!r}"
        )
    if config.patch_size > config.image_size:
        raise ValueError(
            f"vision_config.patch_size must be at most image_size {config.image_size}, got {config.patch_size}"
        )
    config.vision_use_head = False
    return config
