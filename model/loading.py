"""What a folder of weights has to be before a model is taken from it: whole, of the right shapes,
finite, no pickles.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

# What a command line calls the dtypes that weights come in.
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHOWN = 5
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"  # PEFT's: its base model is read from elsewhere
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class CheckpointError(ValueError):
    """A saved model that cannot be used; the message names the file or folder and the tensor or field.

    Example:
        >>> try:
        ...     check_folder("/no/such/folder")
        ... except CheckpointError as error:
        ...     print(error)
        /no/such/folder: no such folder
    """


def check_folder(
    folder: Any, *, subfolder: str = "", use_safetensors: bool | None = None, config: Any = None, state_dict: Any = None
) -> None:
    """Raise if a local folder has no configuration or no whole safetensors files, or if a caller asks for pickles.

    Args:
        folder: of :func:`from_pretrained`; a name that is no local path is left to transformers.
        subfolder: where in it the files lie.
        use_safetensors: False asks for pickles.
        config: what the caller brings itself and the folder need not hold; None for nothing.
        state_dict: the same.

    Raises:
        CheckpointError: with the file that is missing or damaged.
    """
    if use_safetensors is False:
        raise CheckpointError(f"{folder}: use_safetensors=False asks for pickles, which are never opened")
    if folder is None:
        return
    path = Path(folder, subfolder)
    if not path.is_dir():
        if path.is_absolute() or path.exists():
            raise CheckpointError(f"{path}: no such folder")
        return
    adapter = not (path / "config.json").is_file() and (path / "adapter_config.json").is_file()
    if config is None and not adapter and not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: no config.json, which says what model it is")
    if state_dict is None:
        check_weights(path, ADAPTER if adapter else WEIGHTS)


def check_weights(path: Path, weights: str = WEIGHTS) -> list[Path]:
    """The safetensors files in ``path``; raise unless there are some and each is whole."""
    if not (path / weights).is_file() and (path / INDEX).is_file():
        files = _indexed(path / INDEX)
    else:
        files = [path / weights] if (path / weights).is_file() else []
    if not files:
        found = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
        also = f"; pickles are never opened ({', '.join(found)})" if found else ""
        raise CheckpointError(f"{path}: no {weights}; weights must be in safetensors files{also}")
    missing = [f"{file.name}, which {INDEX} names, is missing" for file in files if not file.is_file()]
    raise_problems(path, missing)
    for file in files:
        _check_header(file)
    return files


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of safetensors files: {error}") from error
    if outside:
        raise CheckpointError(f"{index}: names files outside its folder: {', '.join(outside[:_SHOWN])}")
    return [index.parent / name for name in names]


def _check_header(file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file: {error}") from error


def check_loaded(folder: Any, info: dict[str, Any], model: nn.Module) -> None:
    """Raise unless every tensor of ``model`` came from the folder, none was left over and all values are finite."""
    problems = [f"{name} is missing" for name in sorted(info.get("missing_keys", ()))]
    problems += [f"{name} is not part of the model" for name in sorted(info.get("unexpected_keys", ()))]
    for name, stored, wanted in sorted(info.get("mismatched_keys", ())):
        problems.append(f"{name} has shape {tuple(stored)}, the model's has {tuple(wanted)}")
    raise_problems(folder, problems)
    raise_problems(folder, [f"{name} holds values that are not finite" for name in not_finite(model)])


def load_part(cls: Any, folder: Path, spare: str | None = None, **options: Any) -> PreTrainedModel:
    """A published part of a model by transformers' class ``cls``, as strictly as a whole model.

    Args:
        cls: of transformers, an Auto class or a model's own.
        folder: what ``save_pretrained`` wrote.
        spare: a regular expression of the stored tensors that are left out, as a second half that is not used.
        options: of ``from_pretrained``.

    Raises:
        CheckpointError: the folder, or the tensors that do not fit.
    """
    check_folder(folder)
    strict = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = cls.from_pretrained(folder, trust_remote_code=False, **strict, **options)
    left = info.get("unexpected_keys", ())
    info["unexpected_keys"] = [name for name in left if spare is None or not re.search(spare, name)]
    check_loaded(folder, info, model)
    return model


def not_finite(model: nn.Module) -> list[str]:
    """Names of the floating-point parameters and buffers with an infinity or a NaN, those that accelerate has
    offloaded included; what lies on the meta device without values, or is quantised, is left out.
    """
    names = []
    for prefix, module in model.named_modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            stored = _offloaded(module, name) if tensor.is_meta else tensor.data
            if type(stored) is Tensor and stored.is_floating_point() and not torch.isfinite(stored).all():
                names.append(f"{prefix}.{name}" if prefix else name)
    return names


def _offloaded(module: nn.Module, name: str) -> Tensor | None:
    """The values of a parameter that accelerate fetches when ``module`` is called; None if it does not."""
    hook = getattr(module, "_hf_hook", None)
    for own in getattr(hook, "hooks", (hook,)):
        weights = getattr(own, "weights_map", None)
        if weights is not None and f"{getattr(weights, 'prefix', '')}{name}" in getattr(weights, "dataset", weights):
            return weights[name]
    return None


def raise_problems(where: Any, problems: list[str]) -> None:
    """One line with the first few of ``problems``, if there are any."""
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(f"{where}: {'; '.join(problems[:_SHOWN])}{more}")
