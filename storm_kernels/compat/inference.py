"""The few names of ``mamba_ssm.utils`` that Vim and its kin import beside the kernels."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor


@dataclass
class InferenceParams:
    """What a mixer keeps from one token to the next: ``key_value_memory_dict`` holds (conv_state, ssm_state) by layer_idx."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Start over with other limits; the states are cleared in place."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        for states in self.key_value_memory_dict.values():
            for state in states:
                state.zero_()


class GenerationMixin:
    """Greedy generation for a language model whose forward takes (input_ids, inference_params=...) and returns logits, bare or as ``.logits``."""

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, max_length: int, **options) -> Tensor:
        """input_ids (b, l) -> (b, max_length). Sampling options are not supported and raise."""
        if options:
            raise NotImplementedError(f"generate is greedy here and takes no options, got {', '.join(options)}; transformers' generate has them")
        params = InferenceParams(max_seqlen=max_length, max_batch_size=input_ids.shape[0])
        tokens, step = input_ids, input_ids
        while tokens.shape[1] < max_length:
            result = self(step, inference_params=params)
            logits = getattr(result, "logits", result)
            params.seqlen_offset = tokens.shape[1]
            step = logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, step], 1)
        return tokens


def load_config_hf(model_name: str) -> dict:
    """The config.json of a local folder, or of the Hugging Face hub through transformers."""
    with open(_file(model_name, "config.json")) as file:
        return json.load(file)


def load_state_dict_hf(model_name: str, device=None, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The weights in model.safetensors of a local folder, or of the hub; pickled weights are refused."""
    from safetensors.torch import load_file

    weights = load_file(_file(model_name, "model.safetensors"))
    return {name: tensor.to(device=device, dtype=dtype) for name, tensor in weights.items()}


def _file(model_name: str, name: str) -> str:
    folder = Path(model_name)
    if folder.is_dir():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {name}")
        return str(path)
    from transformers.utils import cached_file

    return cached_file(model_name, name)
