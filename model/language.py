"""Qwen2 and Llama from transformers, with random weights."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from .config import LanguageConfig

# What this transformers calls a language model's cache, as an argument and as a field of its
# output: 5.24 renamed it, and 5.40 drops the older name.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
_FAMILIES = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}


def build_language(config: LanguageConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model with random weights in ``dtype``, on the current default device
    (``torch.device`` as a context).

    Built in its dtype from the start: no float32 copy ever exists, so that storm-7b fits one 80 GB
    GPU in bfloat16.
    """
    config_class, model_class = _FAMILIES[config.family]
    sizes = config_class(
        vocab_size=config.vocabulary,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.rms_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tied_embeddings,
        eos_token_id=list(config.eos_ids) or None,
    )
    model = model_class._from_config(sizes, dtype=dtype, attn_implementation="sdpa").eval()
    model.tie_weights()  # not done by itself where the weights are left unset
    return model
