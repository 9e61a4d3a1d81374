"""The few names of ``mamba_ssm.utils`` that Vim and its kin import beside the kernels."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor


@dataclass
class InferenceParams:
    """What a mixer keeps from one token to the next: ``key_value_memory_dict`` holds (conv_state,
    ssm_state) by layer_idx.
    """

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


@dataclass
class DecodedTokens:
    """What :func:`decode` returns: ``sequences`` (b, l) and, if they were asked for, ``scores``:
    logits (b, vocabulary) of each new token.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None


@torch.inference_mode()
def decode(
    input_ids, model, max_length, top_k=1, top_p=0.0, min_p=0.0, temperature=1.0, repetition_penalty=1.0,
    eos_token_id=None, teacher_outputs=None, vocab_size=None, cg=False, enable_timing=False,
    output_scores=False, streamer=None,
) -> DecodedTokens:  # fmt: skip
    """Greedy decoding: input_ids (b, l) -> sequences (b, at most ``max_length``).

    ``model(input_ids, inference_params=...)`` returns logits, bare or as ``.logits``. Greedy is
    what ``top_k=1`` means, whatever ``top_p``, ``min_p`` and ``temperature`` say; other values of
    ``top_k``, and a ``repetition_penalty``, raise. Decoding stops where every sequence has
    ``eos_token_id`` at once. ``teacher_outputs`` (b, m) replace the choice of the first m tokens;
    only the first ``vocab_size`` logits count; ``streamer`` has ``put`` and ``end``. ``cg`` and
    ``enable_timing`` (a CUDA graph, a printed time) change nothing.
    """
    if top_k != 1 or repetition_penalty != 1.0:
        raise NotImplementedError(
            "decoding is greedy here: top_k must be 1 and repetition_penalty 1.0, "
            f"got {top_k!r} and {repetition_penalty!r}; "
            "transformers' generate samples"
        )
    last_only = "num_last_tokens" in inspect.signature(model.forward).parameters
    options = {"num_last_tokens": 1} if last_only else {}
    params = InferenceParams(max_seqlen=max_length, max_batch_size=input_ids.shape[0])
    tokens, step, scores = input_ids, input_ids, []
    if streamer is not None:
        streamer.put(input_ids.cpu())
    while tokens.shape[1] < max_length:
        result = model(step, inference_params=params, **options)
        logits = getattr(result, "logits", result)[:, -1, :vocab_size]
        scores.append(logits)
        at = params.seqlen_offset = tokens.shape[1]
        taught = teacher_outputs is not None and at < teacher_outputs.shape[1]
        step = teacher_outputs[:, at, None] if taught else logits.argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, step], 1)
        if streamer is not None:
            streamer.put(step.cpu())
        if eos_token_id is not None and bool((step == eos_token_id).all()):
            break
    if streamer is not None:
        streamer.end()
    return DecodedTokens(tokens, tuple(scores) if output_scores else None)


class GenerationMixin:
    """Greedy generation for a language model whose forward takes (input_ids, inference_params=...)
    and returns logits, bare or as ``.logits``.
    """

    def generate(
        self, input_ids: Tensor, max_length: int, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0,
        temperature: float = 1.0, return_dict_in_generate: bool = False, output_scores: bool = False, **options,
    ) -> Tensor | DecodedTokens:  # fmt: skip
        """input_ids (b, l) -> (b, at most ``max_length``), or :class:`DecodedTokens`; options as in :func:`decode`."""
        found = decode(
            input_ids, self, max_length, top_k, top_p, min_p, temperature, output_scores=output_scores, **options
        )
        return found if return_dict_in_generate else found.sequences


def load_config_hf(model_name: str) -> dict:
    """The config.json of a local folder, or of the Hugging Face hub through transformers."""
    with open(_file(model_name, "config.json")) as file:
        return json.load(file)


def load_state_dict_hf(model_name: str, device=None, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The weights in model.safetensors of a local folder, or of the hub; pickled weights are
    refused, for reading a pickle can run code.
    """
    from safetensors.torch import load_file

    try:
        path = _file(model_name, "model.safetensors")
    except OSError as error:
        raise type(error)(
            f"{error}; a pickled pytorch_model.bin is not read: convert it once with "
            "safetensors.torch.save_model, or use the checkpoint whose name ends in -hf with transformers"
        ) from None
    return {name: tensor.to(device=device, dtype=dtype) for name, tensor in load_file(path).items()}


def _file(model_name: str, name: str) -> str:
    folder = Path(model_name)
    if folder.is_dir():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {name}")
        return str(path)
    from transformers.utils import cached_file

    return cached_file(model_name, name)
