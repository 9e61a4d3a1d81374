"""Floating-point operations of each part, by formula: what a preset asks of a machine before any of it is built."""

from __future__ import annotations

import math

from storm_kernels.ops.flops import SCAN_PER_STATE

from .config import LanguageConfig, ModelConfig, Variant, VisionConfig

# Sizes of STORM's mixer (docs/spec.md, Symbols): E / D, S, K.
EXPAND, STATES, TAPS = 2, 16, 4


def arithmetic(config: ModelConfig, variant: Variant, frames: int, prompt_tokens: int = 0) -> dict[str, int]:
    """FLOPs to the first token by "vision", "projector" and "language": matrix products, convolutions and the scan.

    A multiplication with its addition counts as two. Causal attention counts the pairs it needs,
    half of the square. The projector is counted in its plain form, every token through every step
    whatever the reduction; a fused projector needs less.
    """
    grid = config.token_grid(frames)
    kept = variant.reduction.reduced(grid).tokens
    return {
        "vision": frames * _vision_frame(config.vision),
        "projector": grid.tokens * _projector_token(config, variant),
        "language": _language(config.language, kept + prompt_tokens),
    }


def _vision_frame(vision: VisionConfig) -> int:
    patches = vision.patches_per_side**2
    embed = 2 * patches * 3 * vision.patch_size**2 * vision.width
    projections = 2 * patches * (4 * vision.width**2 + 2 * vision.width * vision.mlp_width)
    attention = 4 * patches**2 * vision.width
    return embed + vision.layers_run * (projections + attention)


def _projector_token(config: ModelConfig, variant: Variant) -> int:
    width = config.language.width
    embed = 2 * 4 * config.vision.width * width
    if not variant.temporal:
        return embed + 2 * width**2
    inner, rank = EXPAND * width, math.ceil(width / 16)
    per_direction = 2 * inner * (TAPS + (rank + 2 * STATES) + rank) + SCAN_PER_STATE * inner * STATES
    mixer = 2 * width * 2 * inner + (1 + config.bidirectional) * per_direction + 2 * inner * width
    return embed + config.projector_layers * mixer


def _language(language: LanguageConfig, tokens: int) -> int:
    query_and_out = 2 * language.width**2
    key_and_value = 2 * language.width * language.kv_heads * language.head_width
    products = 2 * tokens * (query_and_out + key_and_value + 3 * language.width * language.mlp_width)
    attention = 4 * (tokens * (tokens + 1) // 2) * language.width
    return language.layers * (products + attention) + 2 * language.width * language.vocabulary
