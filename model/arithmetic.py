"""Floating-point operations and memory of each part, by formula: what a model asks of a machine
before any of it is built.
"""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedConfig

from storm_kernels.ops.flops import SCAN_PER_STATE

from .configuration_storm import StormConfig
from .modeling_storm import StormForConditionalGeneration
from .pixels import FRAME_BATCH

__all__ = ["arithmetic", "memory"]


def arithmetic(config: StormConfig, frames: int, prompt_tokens: int = 0) -> dict[str, int]:
    """FLOPs to the first token by "vision", "projector" and "language": matrix products, convolutions and the scan.

    A multiplication with its addition counts as two. Causal attention counts the pairs it needs,
    half of the square. The projector is counted in its plain form, every token through every step
    whatever the reduction; a fused projector needs less.

    Args:
        config: of the model.
        frames: of the video.
        prompt_tokens: of the text beside it; 0 by default.

    Example:
        >>> from storm_model.presets import preset
        >>> sorted(arithmetic(preset("storm-mini"), 8))
        ['language', 'projector', 'vision']
    """
    grid = config.token_grid(frames)
    kept = config.reduction.reduced(grid).tokens
    return {
        "vision": frames * _vision_frame(config.vision_config),
        "projector": grid.tokens * _projector_token(config),
        "language": _language(config.text_config, kept + prompt_tokens),
    }


def memory(
    config: StormConfig, frames: int, prompt_tokens: int = 0, dtype: torch.dtype = torch.bfloat16
) -> dict[str, int]:
    """Bytes at the peak of each step to the first token, weights included.

    By "vision", "projector" and "prefill". Counted are the weights, what the step was given, and the
    tensors that live together in its widest moment: a layer's residual, normed input and
    intermediates; in the projector both directions; for the language model the whole cache.
    ``weights`` alone are in the answer too. Workspaces of libraries and the fragmentation of an allocator are not.

    Args:
        config: of the model.
        frames: of the video.
        prompt_tokens: of the text beside it; 0 by default.
        dtype: of weights and activations; bfloat16 by default.

    Example:
        >>> from storm_model.presets import preset
        >>> sorted(memory(preset("storm-mini"), 8))
        ['prefill', 'projector', 'vision', 'weights']
    """
    vision, text = config.vision_config, config.text_config
    grid, size = config.token_grid(frames), dtype.itemsize
    kept = config.reduction.reduced(grid).tokens
    patches = (vision.image_size // vision.patch_size) ** 2
    weights = size * _parameters(config)
    pixels = frames * 3 * vision.image_size**2 * size
    features = frames * patches * vision.hidden_size * size
    of_layer = (
        FRAME_BATCH * patches * size * max(5 * vision.hidden_size, 2 * vision.hidden_size + vision.intermediate_size)
    )
    length, width = kept + prompt_tokens, text.hidden_size
    cache = 2 * text.num_hidden_layers * length * text.num_key_value_heads * _head_width(text) * size
    of_text = length * size * max(5 * width, 2 * width + 3 * text.intermediate_size)
    # The embeddings, the copy into which the video's tokens are put, and those tokens.
    embeds = (2 * length + kept) * width * size
    return {
        "weights": weights,
        "vision": weights + pixels + features + of_layer,
        "projector": weights + pixels + features + _projector_bytes(config, grid.tokens, size),
        "prefill": weights + pixels + embeds + cache + of_text,
    }


def _parameters(config: StormConfig) -> int:
    with torch.device("meta"):
        model = StormForConditionalGeneration(config)
    return sum(parameter.numel() for parameter in model.parameters())


def _projector_bytes(config: StormConfig, tokens: int, size: int) -> int:
    width = config.text_config.hidden_size
    blocks = 4 * config.vision_config.hidden_size * tokens * size
    if config.projector_type == "vila":
        return 2 * blocks + 3 * width * tokens * size
    inner, rank = int(config.projector_expand * width), math.ceil(width / 16)
    directions = 1 + config.projector_bidirectional
    # x and z, then of each direction its convolution, its step sizes (one more when softplus is
    # taken), R + 2 S and the output of its scan; the residual and the normed input beside them.
    of_direction = 4 * inner + rank + 2 * config.projector_state
    return blocks + tokens * size * (2 * width + 2 * inner + directions * of_direction)


def _vision_frame(vision: PreTrainedConfig) -> int:
    patches = (vision.image_size // vision.patch_size) ** 2
    width = vision.hidden_size
    embed = 2 * patches * 3 * vision.patch_size**2 * width
    projections = 2 * patches * (4 * width**2 + 2 * width * vision.intermediate_size)
    attention = 4 * patches**2 * width
    return embed + vision.num_hidden_layers * (projections + attention)


def _projector_token(config: StormConfig) -> int:
    width = config.text_config.hidden_size
    embed = 2 * 4 * config.vision_config.hidden_size * width
    if config.projector_type == "vila":
        return embed + 2 * width**2
    inner, rank, states = int(config.projector_expand * width), math.ceil(width / 16), config.projector_state
    products = 2 * inner * (config.projector_conv + (rank + 2 * states) + rank)
    per_direction = products + SCAN_PER_STATE * inner * states
    directions = 1 + config.projector_bidirectional
    mixer = 2 * width * 2 * inner + directions * per_direction + 2 * inner * width
    return embed + config.projector_layers * mixer


def _language(text: PreTrainedConfig, tokens: int) -> int:
    width, head = text.hidden_size, _head_width(text)
    query_and_out = 2 * width * text.num_attention_heads * head
    key_and_value = 2 * width * text.num_key_value_heads * head
    products = 2 * tokens * (query_and_out + key_and_value + 3 * width * text.intermediate_size)
    attention = 4 * (tokens * (tokens + 1) // 2) * text.num_attention_heads * head
    return text.num_hidden_layers * (products + attention) + 2 * width * text.vocab_size


def _head_width(text: PreTrainedConfig) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
