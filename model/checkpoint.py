"""Save and load a complete model; build one from local SigLIP and Qwen2 or Llama folders.
Safetensors only: a pickle is never opened, no code is run.

Every tensor's name, shape and dtype is compared with the model's before memory is taken, every
value is checked to be finite.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from storm_kernels.tokens import TokenReduction

from .config import LanguageConfig, ModelConfig, Variant, VisionConfig
from .hub_config import language_config, vision_config
from .loading import CheckpointError
from .parts import FLOATS
from .storm import VideoModel

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_FORMAT = "storm-video-model-1"
# safetensors' names of the dtypes a model has.
_DTYPE_NAMES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class StoredTensor(NamedTuple):
    file: Path
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: torch.dtype


def save(model: VideoModel, folder: str | os.PathLike) -> Path:
    """Write ``config.json`` and ``model.safetensors`` to a new or empty folder; it appears complete
    or not at all, and nothing is overwritten.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder; nothing was written")
    folder.parent.mkdir(parents=True, exist_ok=True)
    description = {
        "format": _FORMAT,
        "config": dataclasses.asdict(model.config),
        "variant": dataclasses.asdict(model.variant),
        "dtype": next(name for name, dtype in FLOATS.items() if dtype == model.dtype),
    }
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        (unfinished / _CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        save_file(
            {name: tensor.contiguous() for name, tensor in _own_tensors(model).items()},
            unfinished / _WEIGHTS,
            metadata={"format": "pt"},
        )
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def load(folder: str | os.PathLike, *, projector: str = "reference", device: torch.device | str = "cpu") -> VideoModel:
    """The model that :func:`save` wrote, in its dtype; a CheckpointError names the first thing that does not fit."""
    folder = Path(folder)
    config, variant, dtype = _read_description(folder)
    stored = _stored_tensors(folder)
    layers = config.vision.layers_run + config.language.layers + config.projector_layers * variant.temporal
    if layers > len(stored):
        raise CheckpointError(
            f"{folder}: {_CONFIG} speaks of {layers} layers, the weights are only {len(stored)} tensors"
        )
    _compare(
        folder,
        _own_tensors(VideoModel(config, variant, projector, device="meta", dtype=dtype)),
        stored,
        exact_dtype=True,
    )
    model = VideoModel(config, variant, projector, device=device, dtype=dtype, blank=True)
    _fill(_own_tensors(model), stored)
    return model


def from_pretrained_parts(
    vision_dir: str | os.PathLike,
    language_dir: str | os.PathLike,
    variant: Variant,
    projector: str = "reference",
    *,
    projector_layers: int = 4,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> VideoModel:
    """A model from a local SigLIP folder and a local Qwen2 or Llama folder, as Hugging Face lays
    them out; the projector's weights are random.

    SigLIP's text half, its pooling head, final norm and the layers above ``feature_layer`` are left
    in the file. ``dtype`` None takes the language model's own; weights stored in another float type
    are converted.
    """
    vision_dir, language_dir = Path(vision_dir), Path(language_dir)
    vision = vision_config(vision_dir / _CONFIG)
    language = language_config(language_dir / _CONFIG)
    config = ModelConfig(f"{vision_dir.name}+{language_dir.name}", vision, language, projector_layers)
    vision_stored = _rename(_stored_tensors(vision_dir), _vision_renamer(vision))
    language_stored = _rename(_stored_tensors(language_dir), _language_renamer(language))
    if dtype is None:
        dtype = next(iter(language_stored.values())).dtype if language_stored else torch.float32
    expected = VideoModel(config, variant, projector, device="meta", dtype=dtype)
    _compare(vision_dir, expected.vision.state_dict(), vision_stored, exact_dtype=False)
    _compare(language_dir, _own_tensors(expected, "language."), language_stored, exact_dtype=False)
    model = VideoModel(config, variant, projector, seed=seed, device=device, dtype=dtype, blank=True)
    _fill(model.vision.state_dict(), vision_stored)
    _fill(_own_tensors(model, "language."), language_stored)
    return model


def _own_tensors(model: VideoModel, prefix: str = "") -> dict[str, Tensor]:
    """The state dict's entries under ``prefix``, which is cut off, without the output matrix where
    it is the embedding itself.
    """
    state = model.state_dict()
    if model.config.language.tied_embeddings:
        del state["language.lm_head.weight"]
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _read_description(folder: Path) -> tuple[ModelConfig, Variant, torch.dtype]:
    path = folder / _CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"format is {content['format']!r}, not {_FORMAT!r}")
        config, variant = dict(content["config"]), dict(content["variant"])
        language = dict(config["language"])
        language["eos_ids"] = tuple(language["eos_ids"])
        config.update(vision=VisionConfig(**config["vision"]), language=LanguageConfig(**language))
        variant["reduction"] = TokenReduction(**variant["reduction"])
        return ModelConfig(**config), Variant(**variant), FLOATS[content["dtype"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path}: not the description of a saved model: {type(error).__name__}: {error}"
        ) from error


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors file or files, from their headers."""
    files = [folder / _WEIGHTS]
    if not files[0].is_file() and (folder / _INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder / _INDEX}: not an index of safetensors files: {error}") from error
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{folder / _INDEX}: names files outside its folder: {names}")
        files = [folder / name for name in names]
    stored: dict[str, StoredTensor] = {}
    for file in files:
        if not file.is_file():
            other = sorted(path.name for path in folder.glob("*.bin")) + sorted(
                path.name for path in folder.glob("*.pt*")
            )
            pickles = f"; pickles are never opened ({', '.join(other)})" if other else ""
            raise CheckpointError(f"{file}: no such file; weights must be in safetensors files{pickles}")
        stored.update(_header(file))
    return stored


def _header(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            parts = {name: tensors.get_slice(name) for name in names}
            described = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file: {error}") from error
    for name, (_, dtype) in described.items():
        if dtype not in _DTYPE_NAMES and not _is_position_buffer(name):
            raise CheckpointError(
                f"{file}: tensor {name} is of dtype {dtype}; it must be one of {', '.join(_DTYPE_NAMES)}"
            )
    return {
        name: StoredTensor(file, name, shape, _DTYPE_NAMES.get(dtype)) for name, (shape, dtype) in described.items()
    }


def _is_position_buffer(name: str) -> bool:
    """Constants that old versions of transformers stored with the weights."""
    return name.endswith(("position_ids", "rotary_emb.inv_freq"))


def _vision_renamer(config: VisionConfig) -> Callable[[str], str | None]:
    unused = ("text_model.", "logit_scale", "logit_bias", "vision_model.head.", "vision_model.post_layernorm.")
    above = tuple(f"vision_model.encoder.layers.{i}." for i in range(config.layers_run, config.layers))

    def rename(name: str) -> str | None:
        if name.startswith(unused + above) or _is_position_buffer(name):
            return None
        return name.removeprefix("vision_model.").removeprefix("encoder.")

    return rename


def _language_renamer(config: LanguageConfig) -> Callable[[str], str | None]:
    def rename(name: str) -> str | None:
        return None if _is_position_buffer(name) or (config.tied_embeddings and name == "lm_head.weight") else name

    return rename


def _rename(stored: dict[str, StoredTensor], rename: Callable[[str], str | None]) -> dict[str, StoredTensor]:
    """Our names for stored tensors; those renamed to None are left out."""
    return {new: tensor for name, tensor in stored.items() if (new := rename(name)) is not None}


def _compare(folder: Path, expected: dict[str, Tensor], stored: dict[str, StoredTensor], *, exact_dtype: bool) -> None:
    """Same names, shapes and, if ``exact_dtype``, dtypes; otherwise an error that lists the first few differences."""
    problems = [f"{name} is missing" for name in expected if name not in stored]
    problems += [f"{name} is not part of the model" for name in stored if name not in expected]
    for name, tensor in expected.items():
        found = stored.get(name)
        if found and found.shape != tuple(tensor.shape):
            problems.append(f"{name} has shape {found.shape}, the model's has {tuple(tensor.shape)}")
        elif found and exact_dtype and found.dtype != tensor.dtype:
            problems.append(f"{name} is {found.dtype}, the model's is {tensor.dtype}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{folder}: {'; '.join(problems[:5])}{more}")


@torch.no_grad()
def _fill(tensors: dict[str, Tensor], stored: dict[str, StoredTensor]) -> None:
    """Copy the stored values into a model's tensors, one at a time."""
    by_file: dict[Path, list[str]] = {}
    for name, source in stored.items():
        by_file.setdefault(source.file, []).append(name)
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as source:
            for name in names:
                value = source.get_tensor(stored[name].name)
                if not torch.isfinite(value).all():
                    raise CheckpointError(f"{file}: tensor {stored[name].name} holds values that are not finite")
                tensors[name].copy_(value)
