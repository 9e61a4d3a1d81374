"""The models to compare: presets (sizes) and variants (projector and token reduction).
docs/spec.md, "Presets" and "The models to compare".
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeVar

from transformers import LlamaConfig, Qwen2Config, SiglipVisionConfig

from storm_kernels.tokens import TokenReduction

from .configuration_storm import StormConfig, checked_reduction

__all__ = ["PRESETS", "VARIANTS", "Variant", "preset", "variant"]

Entry = TypeVar("Entry")

# The SigLIP towers: huggingface.co google/siglip-so400m-patch14-384 and google/paligemma-3b-pt-448,
# config.json. Of their 27 layers the last is left out: published NVILA training reads the output of
# the last but one (github.com/NVlabs/VILA, scripts/NVILA-Lite/sft.sh: mm_vision_select_layer -2),
# and STORM is trained from VILA.
_SO400M: dict[str, Any] = {
    "patch_size": 14,
    "hidden_size": 1152,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "intermediate_size": 4304,
}
_QWEN2: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-6}


def _preset(name: str, vision: SiglipVisionConfig, text: Qwen2Config | LlamaConfig, layers: int) -> StormConfig:
    """The placeholders are the vocabulary's last two, which the published tokenizers leave unused."""
    return StormConfig(
        name_or_path=name,  # type: ignore[call-arg]  # transformers takes it among its own
        vision_config=vision,
        text_config=text,
        projector_layers=layers,
        image_token_id=text.vocab_size - 2,
        video_token_id=text.vocab_size - 1,
    )


_PRESETS = (
    # The paper's model. Sizes: huggingface.co Qwen/Qwen2-7B, config.json. M = 4: the paper does not
    # give M, but its 348 ms for the projector at 256 frames fit four layers (docs/kernels.md,
    # "Limits per layer").
    _preset(
        "storm-7b",
        SiglipVisionConfig(image_size=448, **_SO400M),
        Qwen2Config(
            num_hidden_layers=28, hidden_size=3584, num_attention_heads=28, num_key_value_heads=4,
            intermediate_size=18944, vocab_size=152064, max_position_embeddings=131072, eos_token_id=151643, **_QWEN2,
        ),
        layers=4,
    ),
    # VILA's other family. Sizes: huggingface.co meta-llama/Meta-Llama-3-8B, config.json.
    _preset(
        "storm-8b",
        SiglipVisionConfig(image_size=384, **_SO400M),
        LlamaConfig(
            num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8,
            intermediate_size=14336, vocab_size=128256, max_position_embeddings=8192, eos_token_id=128001,
            rope_parameters={"rope_type": "default", "rope_theta": 5e5}, rms_norm_eps=1e-5,
        ),
        layers=4,
    ),
    # Sizes: huggingface.co Qwen/Qwen2-1.5B, config.json.
    _preset(
        "storm-1.5b",
        SiglipVisionConfig(image_size=384, **_SO400M),
        Qwen2Config(
            num_hidden_layers=28, hidden_size=1536, num_attention_heads=12, num_key_value_heads=2,
            intermediate_size=8960, vocab_size=151936, max_position_embeddings=131072, eos_token_id=151643,
            tie_word_embeddings=True, **_QWEN2,
        ),
        layers=4,
    ),
    # Sized by its arithmetic: at 128 frames LLM, vision and projector take 72, 24 and 4 % as in the
    # paper's Table 13 (tests/model/test_presets.py prints them), and a run takes seconds on two CPU
    # cores.
    _preset(
        "storm-mini",
        SiglipVisionConfig(
            image_size=112, patch_size=14, hidden_size=256, num_hidden_layers=7, num_attention_heads=4,
            intermediate_size=896,
        ),
        Qwen2Config(
            num_hidden_layers=10, hidden_size=640, num_attention_heads=10, num_key_value_heads=2,
            intermediate_size=2176, vocab_size=8192, max_position_embeddings=32768, eos_token_id=None, **_QWEN2,
        ),
        layers=1,
    ),
)  # fmt: skip
PRESETS: dict[str, StormConfig] = {str(config.name_or_path): config for config in _PRESETS}


def preset(name: str) -> StormConfig:
    """A copy of the preset of that name, which its ``name_or_path`` repeats.

    Args:
        name: "storm-7b", "storm-8b", "storm-1.5b" or "storm-mini".

    Raises:
        ValueError: there is no such preset; it lists those that exist.

    Source:
        The files of each part's sizes stand beside it in this module.

    Example:
        >>> preset("storm-mini").text_config.hidden_size
        640
    """
    return copy.deepcopy(_look_up("preset", name, PRESETS))


@dataclass(frozen=True)
class Variant:
    """A projector and a token reduction.

    Args:
        name: such as "storm-tp-ts".
        title: for tables and plots.
        temporal: True for STORM's temporal projector, False for the VILA baseline's, which mixes nothing over time.
        reduction: of the tokens; none by default.
        paper_latency_s: the paper's time to first token at 128 frames on an A100-80G, in seconds; None where it has
            none.
        paper_kept_percent: the tokens that are left there, in percent; None where it has none.

    Raises:
        TypeError: a reduction that is none.
        ValueError: a reduction that is out of range.

    Source:
        STORM, arXiv 2503.04130 (docs/spec.md, "The models to compare").

    Example:
        >>> pairs = Variant("mine", "pairs of frames", temporal=True, reduction=TokenReduction(2))
        >>> pairs.of(preset("storm-mini")).reduction
        TokenReduction(temporal_pool=2, spatial_pool=1, temporal_stride=1)
    """

    name: str
    title: str
    temporal: bool
    reduction: TokenReduction = TokenReduction()
    paper_latency_s: float | None = None
    paper_kept_percent: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.reduction, TokenReduction):
            raise TypeError(f"Variant.reduction must be a TokenReduction, got {self.reduction!r}")
        checked_reduction(*vars(self.reduction).values())

    def of(self, config: StormConfig, implementation: str | None = None) -> StormConfig:
        """``config`` with this projector and reduction, and the ``implementation`` of the projector if one is named."""
        changed = copy.deepcopy(config)
        changed.projector_type = "storm" if self.temporal else "vila"
        changed.projector_implementation = implementation or config.projector_implementation
        for name, size in vars(self.reduction).items():
            setattr(changed, name, size)
        return changed


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
    """The variant of that name.

    Args:
        name: "vila", "storm", or "storm" with "-tp", "-sp", "-ts" in this order, as :data:`VARIANTS` has them.

    Raises:
        ValueError: there is no such variant; it lists those that exist.

    Example:
        >>> variant("storm-tp").reduction.temporal_pool
        4
    """
    return _look_up("variant", name, VARIANTS)


def _look_up(what: str, name: object, table: dict[str, Entry]) -> Entry:
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"{what} {name!r} does not exist; there are: {', '.join(table)}")
    return table[name]
