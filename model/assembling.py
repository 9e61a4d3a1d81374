"""Published parts to one model: a SigLIP tower and a causal language model from their folders, a
projector between them, and the folder that all of transformers' Auto classes load.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
)

from .configuration_storm import StormConfig
from .loading import CheckpointError, check_folder, load_part, not_finite, raise_problems
from .modeling_storm import StormForConditionalGeneration
from .processing_storm import IMAGE_TOKEN, VIDEO_TOKEN, StormProcessor, chat_template
from .projector import build_projector
from .video_processing_storm import REDUCTION, StormImageProcessor, StormVideoProcessor

# Tensors of a SigLIP checkpoint that no projector reads: its text half and its pooling head.
_UNUSED_OF_SIGLIP = r"^(text_model\.|logit_scale$|logit_bias$|(vision_model\.)?head\.)"
# The embeddings grow to a multiple of it, so that they can be split evenly over devices.
_VOCABULARY_STEP = 64


def load_tower(folder: Path, layer: int) -> PreTrainedModel:
    """The SigLIP or SigLIP2 tower of ``folder``, up to the layer whose output the projector reads.

    Args:
        layer: counted from the end, as VILA's ``mm_vision_select_layer``: -1 is the last, -2 the last but one.

    Raises:
        CheckpointError: no such tower, no such layer, or another normalisation of pixels than SigLIP's.
    """
    try:
        config = StormConfig(vision_config=read_config(folder)).vision_config
    except ValueError as error:
        raise CheckpointError(error if str(error).startswith(str(folder)) else f"{folder}: {error}") from error
    if type(layer) is not int or not -config.num_hidden_layers <= layer <= -1:
        raise CheckpointError(
            f"{folder}: the tower has {config.num_hidden_layers} layers, so the one that is read must be between "
            f"-{config.num_hidden_layers} and -1, got {layer!r}"
        )
    _check_normalisation(folder)
    model = load_part(SiglipVisionModel, folder, _UNUSED_OF_SIGLIP, config=config, dtype="auto")
    tower = getattr(model, "vision_model", model)  # some releases nest the tower once more
    tower.config.num_hidden_layers += layer + 1
    tower.encoder.layers = tower.encoder.layers[: tower.config.num_hidden_layers]
    tower.post_layernorm = nn.Identity()
    return tower


def load_language(folder: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The causal language model of ``folder``.

    Raises:
        CheckpointError: quantised weights, or a model whose logits are more than its head's product.
    """
    config = read_config(folder)
    if config.get_text_config() is not config:
        raise CheckpointError(f"{folder}: a {config.model_type} is more than a language model")
    if getattr(config, "quantization_config", None):
        raise CheckpointError(f"{folder}: its weights are quantised; give the model in full precision")
    try:
        language = load_part(AutoModelForCausalLM, folder, dtype=dtype)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{folder}: not a causal language model of transformers: {error}") from error
    _check_head(folder, language)
    return language


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of ``folder`` with the placeholders of images and videos, and something to pad with."""
    check_local(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{folder}: no tokenizer that can be read: {error}") from error
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # transformers makes an empty one without any file
        raise CheckpointError(f"{folder}: no tokenizer that can be read: its vocabulary is not there")
    tokenizer.add_tokens([IMAGE_TOKEN, VIDEO_TOKEN], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def assemble(
    tower: PreTrainedModel,
    language: PreTrainedModel,
    tokenizer: Any,
    projector: nn.Module | None = None,
    **fields: Any,
) -> StormForConditionalGeneration:
    """The whole model in the language model's dtype; it holds the parts themselves, no copies of them.

    Args:
        tokenizer: of :func:`load_tokenizer`; the language model's embeddings are widened to its placeholders.
        projector: with weights; None for random ones, which the configuration then says.
        fields: of :class:`StormConfig`.

    Raises:
        CheckpointError: a language model that cannot be loaded as a part, or weights too large for its dtype.
    """
    numbers = {
        "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "video_token_id": tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
    }
    _widen(language, max(len(tokenizer), *(number + 1 for number in numbers.values())))
    config = StormConfig(vision_config=tower.config, text_config=language.config, **numbers, **fields)
    config.random_parts = ["projector"] if projector is None else None
    with torch.device("meta"):
        model = StormForConditionalGeneration(config)
    if type(model.model.language_model) is not type(language.base_model):
        raise CheckpointError(
            f"{type(language).__name__} has a {type(language.base_model).__name__} inside, "
            f"where AutoModel makes a {type(model.model.language_model).__name__}: it cannot be loaded again"
        )
    model.model.vision_tower = _in_dtype("vision tower", tower, language.dtype)
    if projector is None:
        projector = build_projector(config, device="cpu", dtype=language.dtype)
    model.model.projector = _in_dtype("projector", projector, language.dtype)
    model.model.language_model, model.lm_head = language.base_model, language.get_output_embeddings()
    model.generation_config = language.generation_config
    return model.eval()


def processor_of(
    model: StormForConditionalGeneration,
    tokenizer: Any,
    template: str | None = None,
    frame_separator: str = "",
    **of_videos: Any,
) -> StormProcessor:
    """The processor that counts as ``model`` reduces.

    Args:
        template: Jinja; by default :func:`storm_model.processing_storm.chat_template` of the tokenizer.
        of_videos: further arguments of :class:`StormVideoProcessor`.
    """
    vision = model.config.vision_config
    sizes = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    sizes |= {name: getattr(model.config, name) for name in REDUCTION}
    return StormProcessor(
        StormImageProcessor(**sizes),
        tokenizer,
        StormVideoProcessor(**sizes, **of_videos),
        chat_template=template or chat_template(tokenizer),
        frame_separator=frame_separator,
    )


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` to write into, which becomes ``out`` when all went well, and goes when not.

    Raises:
        ValueError: there is something at ``out`` already.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"--out: {out} exists already")
    beside = out.with_name(f".{out.name}.{os.getpid()}.part")
    beside.mkdir(parents=True)
    try:
        yield beside
        os.replace(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_local(folder: Path) -> None:
    """Raise unless ``folder`` is one; transformers would take its name for one of a model on a server."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")


def read_config(folder: Path) -> PreTrainedConfig:
    """What model ``folder`` holds; no code of it is run."""
    check_local(folder)
    check_folder(folder)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{folder}: config.json does not name a model of transformers: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an error that names the file where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent}: no {path.name}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold an object, got a {type(content).__name__}")
    return content


def _check_normalisation(folder: Path) -> None:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return
    content = read_json(path)
    for name in ("image_mean", "image_std"):
        given = content.get(name, [0.5] * 3)
        if given != [0.5] * 3:
            raise CheckpointError(f"{path}: {name} must be SigLIP's, [0.5, 0.5, 0.5], got {given}")


@torch.inference_mode()
def _check_head(folder: Path, language: PreTrainedModel) -> None:
    """Raise unless the logits are the head's product with what the model makes of embeddings alone.

    Some families scale or cap the logits or embed a token in each layer: taken apart and put together
    again, they would answer, but as another model.
    """
    head, base = language.get_output_embeddings(), language.base_model
    ids = torch.arange(4, dtype=torch.int64, device="cpu")[None]
    plain = type(head) is nn.Linear and head.bias is None
    if plain:
        hidden = base(inputs_embeds=language.get_input_embeddings()(ids), use_cache=False).last_hidden_state
        plain = torch.allclose(head(hidden), language(input_ids=ids, use_cache=False).logits, equal_nan=True)
    if not plain:
        raise CheckpointError(
            f"{folder}: the logits of {type(language).__name__} are more than its head's product with the last hidden "
            "state (a bias, a scale, a cap): it cannot be taken apart"
        )


def _in_dtype(name: str, part: nn.Module, dtype: torch.dtype) -> nn.Module:
    part.to(dtype)
    too_large = not_finite(part)
    raise_problems(f"the {name} in {dtype}", [f"{weight} holds values that are not finite" for weight in too_large])
    return part


@torch.no_grad()
def _widen(language: PreTrainedModel, tokens: int) -> None:
    """Rows for tokens that the embeddings do not have: the mean of the others, which no answer prefers."""
    before = language.get_input_embeddings().weight.shape[0]
    if tokens <= before:
        return
    language.resize_token_embeddings(tokens, pad_to_multiple_of=_VOCABULARY_STEP, mean_resizing=False)
    for module in (language.get_input_embeddings(), language.get_output_embeddings()):
        module.weight[before:] = module.weight[:before].mean(0, dtype=torch.float32).to(module.weight.dtype)
