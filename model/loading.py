"""What a folder of weights has to be before a model is taken from it: whole, of the right shapes,
finite, no pickles.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

# What a command line calls the dtypes that weights come in.
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHOWN = 5
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class CheckpointError(ValueError):
    """A saved model that cannot be used; the message names the file or folder and the tensor or field."""


def check_files(folder: str | os.PathLike, use_safetensors: bool | None = None) -> list[Path]:
    """The safetensors files of a local folder, whose headers are whole; [] for a name that is no local path.

    Raises:
        CheckpointError: no folder, no such files, only pickles, a broken file or index; or a caller asks for pickles.
    """
    if use_safetensors is False:
        raise CheckpointError(f"{folder}: use_safetensors=False asks for pickles, which are never opened")
    path = Path(folder)
    if not path.is_dir():
        if path.is_absolute() or path.exists():
            raise CheckpointError(f"{path}: no such folder")
        return []
    if not (path / WEIGHTS).is_file() and (path / INDEX).is_file():
        files = _indexed(path / INDEX)
    else:
        files = [path / WEIGHTS] if (path / WEIGHTS).is_file() else []
    if not files:
        found = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
        also = f"; pickles are never opened ({', '.join(found)})" if found else ""
        raise CheckpointError(f"{path}: no {WEIGHTS}; weights must be in safetensors files{also}")
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
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file, though the index names it")
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


def not_finite(model: nn.Module) -> list[str]:
    """Names of the floating-point parameters and buffers with an infinity or a NaN; those on the
    meta device are left out.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [
        name
        for name, tensor in tensors
        if type(tensor.data) is torch.Tensor
        and tensor.is_floating_point()
        and not tensor.is_meta
        and not torch.isfinite(tensor).all()
    ]


def raise_problems(where: Any, problems: list[str]) -> None:
    """One line with the first few of ``problems``, if there are any."""
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(f"{where}: {'; '.join(problems[:_SHOWN])}{more}")
