"""Sizes from the ``config.json`` of a local Hugging Face folder. Only numbers are read;
``auto_map`` and the like have no effect.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import LlamaConfig, Qwen2Config, SiglipVisionConfig

from .config import LanguageConfig, VisionConfig
from .loading import CheckpointError

_LANGUAGE_CLASSES = {"qwen2": Qwen2Config, "llama": LlamaConfig}


def vision_config(path: Path) -> VisionConfig:
    """Of a SigLIP model ("siglip") or of its vision half alone ("siglip_vision_model")."""
    content = _read(path, ("siglip", "siglip_vision_model"))
    sizes = _parse(
        path, SiglipVisionConfig, content.get("vision_config", {}) if content["model_type"] == "siglip" else content
    )
    _require(path, sizes, {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3, "layer_norm_eps": 1e-6})
    return VisionConfig(
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
        width=sizes.hidden_size,
        layers=sizes.num_hidden_layers,
        heads=sizes.num_attention_heads,
        mlp_width=sizes.intermediate_size,
    )


def language_config(path: Path) -> LanguageConfig:
    """Of a Qwen2 or Llama causal language model; features that the plain architecture does not have
    are an error, not ignored.
    """
    content = _read(path, tuple(_LANGUAGE_CLASSES))
    sizes = _parse(path, _LANGUAGE_CLASSES[content["model_type"]], content)
    plain = {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False, "mlp_bias": False}
    _require(path, sizes, plain | {"head_dim": sizes.hidden_size // sizes.num_attention_heads})
    rope = sizes.rope_parameters
    if rope["rope_type"] != "default":
        raise CheckpointError(f"{path}: rope_type {rope['rope_type']!r} is not supported, only 'default'")
    eos = sizes.eos_token_id
    return LanguageConfig(
        family=content["model_type"],
        layers=sizes.num_hidden_layers,
        width=sizes.hidden_size,
        heads=sizes.num_attention_heads,
        kv_heads=sizes.num_key_value_heads,
        mlp_width=sizes.intermediate_size,
        vocabulary=sizes.vocab_size,
        rope_theta=float(rope["rope_theta"]),
        max_positions=sizes.max_position_embeddings,
        rms_eps=sizes.rms_norm_eps,
        tied_embeddings=sizes.tie_word_embeddings,
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    )


def _read(path: Path, model_types: tuple[str, ...]) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if model_type not in model_types:
        raise CheckpointError(f"{path}: model_type is {model_type!r}; it must be one of {', '.join(model_types)}")
    return content


def _parse(path: Path, config_class, content: dict):
    try:
        return config_class(**content)
    except Exception as error:  # transformers raises types of its own that differ between releases
        raise CheckpointError(f"{path}: not a valid {config_class.__name__}: {error}") from error


def _require(path: Path, sizes, values: dict) -> None:
    for name, value in values.items():
        if (found := getattr(sizes, name, value)) not in (value, None):
            raise CheckpointError(f"{path}: {name} = {found!r} is not supported, only {value!r}")
