"""The models to compare: presets (sizes) and variants (projector and token reduction).
docs/spec.md, "Presets" and "The models to compare".
"""

from __future__ import annotations

from dataclasses import dataclass

from storm_kernels.tokens import TokenGrid, TokenReduction, positive_int

from .configuration_storm import MAX_REDUCTION, token_grid


@dataclass(frozen=True)
class VisionConfig:
    """A SigLIP image encoder (arXiv 2303.15343) without its pooling head.

    ``feature_layer`` names the hidden state that goes to the projector, counted from the end as in
    ``hidden_states[feature_layer]``: -1 is the last layer's output, -2 that of the layer before.
    Published NVILA training takes -2 (github.com/NVlabs/VILA, scripts/NVILA-Lite/sft.sh:
    ``mm_vision_select_layer -2``), STORM is trained from VILA, and so all presets take -2. Layers
    above it are neither kept nor run.
    """

    image_size: int  # pixels, square
    patch_size: int  # pixels, square
    width: int
    layers: int  # of the published tower, those above feature_layer included
    heads: int
    mlp_width: int
    feature_layer: int = -2

    def __post_init__(self):
        for name in ("image_size", "patch_size", "width", "layers", "heads", "mlp_width"):
            positive_int(f"VisionConfig.{name}", getattr(self, name))
        _divides("VisionConfig", "heads", self.heads, "width", self.width)
        if self.patch_size > self.image_size:
            raise ValueError(
                f"VisionConfig.patch_size must be at most image_size {self.image_size}, got {self.patch_size}"
            )
        if (
            isinstance(self.feature_layer, bool)
            or not isinstance(self.feature_layer, int)
            or not -self.layers <= self.feature_layer <= -1
        ):
            raise ValueError(
                f"VisionConfig.feature_layer must be an integer from -{self.layers} to -1, got {self.feature_layer!r}"
            )

    @property
    def layers_run(self) -> int:
        return self.layers + 1 + self.feature_layer

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class LanguageConfig:
    """A Qwen2 (arXiv 2407.10671) or Llama 3 (arXiv 2407.21783) causal language model."""

    family: str  # "qwen2" or "llama"
    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp_width: int
    vocabulary: int
    rope_theta: float
    max_positions: int
    rms_eps: float
    tied_embeddings: bool = False
    eos_ids: tuple[int, ...] = ()  # generation stops at any of them

    def __post_init__(self):
        if self.family not in ("qwen2", "llama"):
            raise ValueError(f'LanguageConfig.family must be "qwen2" or "llama", got {self.family!r}')
        for name in ("layers", "width", "heads", "kv_heads", "mlp_width", "vocabulary", "max_positions"):
            positive_int(f"LanguageConfig.{name}", getattr(self, name))
        _divides("LanguageConfig", "heads", self.heads, "width", self.width)
        _divides("LanguageConfig", "kv_heads", self.kv_heads, "heads", self.heads)

    @property
    def head_width(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a complete model; with a :class:`Variant` it says all that a
    :class:`model.storm.VideoModel` is, but for its weights.
    """

    name: str
    vision: VisionConfig
    language: LanguageConfig
    projector_layers: int  # M, Mamba layers of STORM's projector
    bidirectional: bool = True

    def __post_init__(self):
        positive_int("ModelConfig.projector_layers", self.projector_layers)

    def token_grid(self, frames: int) -> TokenGrid:
        """Tokens of a video after the 2x2 downsample (odd sides are padded), before the reduction."""
        return token_grid(frames, self.vision.image_size, self.vision.patch_size)


def _divides(owner: str, name: str, value: int, of_name: str, of: int) -> None:
    if of % value:
        raise ValueError(f"{owner}.{name} must divide {of_name} {of}, got {value}")


# Sizes of the SigLIP towers: huggingface.co google/siglip-so400m-patch14-384 and
# google/paligemma-3b-pt-448, config.json.
_SO400M = {"patch_size": 14, "width": 1152, "layers": 27, "heads": 16, "mlp_width": 4304}
_SO400M_448 = VisionConfig(image_size=448, **_SO400M)
_SO400M_384 = VisionConfig(image_size=384, **_SO400M)

_PRESETS = (
    # The paper's model. Sizes: huggingface.co Qwen/Qwen2-7B, config.json. M = 4: the paper does not
    # give M, but its 348 ms for the projector at 256 frames fit four layers (docs/kernels.md,
    # "Limits per layer").
    ModelConfig(
        "storm-7b",
        _SO400M_448,
        LanguageConfig("qwen2", 28, 3584, 28, 4, 18944, 152064, 1e6, 131072, 1e-6, eos_ids=(151643,)),
        projector_layers=4,
    ),
    # VILA's other family. Sizes: huggingface.co meta-llama/Meta-Llama-3-8B, config.json.
    ModelConfig(
        "storm-8b",
        _SO400M_384,
        LanguageConfig("llama", 32, 4096, 32, 8, 14336, 128256, 5e5, 8192, 1e-5, eos_ids=(128001,)),
        projector_layers=4,
    ),
    # Sizes: huggingface.co Qwen/Qwen2-1.5B, config.json.
    ModelConfig(
        "storm-1.5b",
        _SO400M_384,
        LanguageConfig(
            "qwen2", 28, 1536, 12, 2, 8960, 151936, 1e6, 131072, 1e-6, tied_embeddings=True, eos_ids=(151643,)
        ),
        projector_layers=4,
    ),
    # Sized by its arithmetic: at 128 frames LLM, vision and projector take 72, 24 and 4 % as in the
    # paper's Table 13 (tests/model/test_model.py prints them), and a run takes seconds on two CPU
    # cores.
    ModelConfig(
        "storm-mini",
        VisionConfig(image_size=112, patch_size=14, width=256, layers=8, heads=4, mlp_width=896),
        LanguageConfig("qwen2", 10, 640, 10, 2, 2176, 8192, 1e6, 32768, 1e-6),
        projector_layers=1,
    ),
)
PRESETS: dict[str, ModelConfig] = {config.name: config for config in _PRESETS}


def preset(name: str) -> ModelConfig:
    """The preset of that name; a ValueError lists those that exist."""
    return _look_up("preset", name, PRESETS)


@dataclass(frozen=True)
class Variant:
    """A projector and a token reduction. ``paper_*`` are the paper's figures at 128 frames on an
    A100-80G (docs/spec.md, "The models to compare").
    """

    name: str
    title: str
    temporal: bool  # True: STORM's temporal projector; False: the VILA baseline's, which mixes nothing over time
    reduction: TokenReduction = TokenReduction()
    paper_latency_s: float | None = None
    paper_kept_percent: float | None = None

    def __post_init__(self):
        if not isinstance(self.reduction, TokenReduction):
            raise TypeError(f"Variant.reduction must be a TokenReduction, got {self.reduction!r}")
        for name in ("temporal_pool", "spatial_pool", "temporal_stride"):
            if getattr(self.reduction, name) > MAX_REDUCTION:
                raise ValueError(
                    f"Variant.reduction.{name} must be at most {MAX_REDUCTION}, got {getattr(self.reduction, name)}"
                )


# The paper's k = 4, p = 2, s = 2.
_VARIANTS = (
    Variant("vila", "VILA baseline", False, TokenReduction(), 4.31, 100.0),
    Variant("storm", "STORM", True, TokenReduction(), 4.47, 100.0),
    Variant("storm-ts", "STORM + T. sampling", True, TokenReduction(temporal_stride=2), 2.50, 50.0),
    Variant("storm-tp", "STORM + T. pooling", True, TokenReduction(temporal_pool=4), 1.82, 25.0),
    Variant("storm-sp", "STORM + S. pooling", True, TokenReduction(spatial_pool=2), 1.82, 25.0),
    Variant(
        "storm-tp-ts",
        "STORM + T. pooling + T. sampling",
        True,
        TokenReduction(temporal_pool=4, temporal_stride=2),
        1.51,
        12.5,
    ),
    Variant(
        "storm-tp-sp",
        "STORM + T. pooling + S. pooling",
        True,
        TokenReduction(temporal_pool=4, spatial_pool=2),
        1.36,
        6.25,
    ),
    Variant(
        "storm-tp-sp-ts", "STORM + T. pooling + S. pooling + T. sampling", True, TokenReduction(4, 2, 2), 1.29, 3.13
    ),
)
VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _VARIANTS}


def variant(name: str) -> Variant:
    """The variant of that name; a ValueError lists those that exist."""
    return _look_up("variant", name, VARIANTS)


def _look_up(what: str, name: object, table: dict):
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"{what} {name!r} does not exist; there are: {', '.join(table)}")
    return table[name]
