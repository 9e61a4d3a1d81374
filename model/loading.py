"""What a folder of weights has to be before a model is taken from it: whole, of the right shapes,
finite, no pickles.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

_SHOWN = 5
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class CheckpointError(ValueError):
    """A saved model that cannot be used; the message names the file or folder and the tensor or field."""


def refuse_pickles(folder: str | os.PathLike, use_safetensors: bool | None = None) -> None:
    """Raise if a local folder has no safetensors files but pickles, or if a caller asks for those."""
    if use_safetensors is False:
        raise CheckpointError(f"{folder}: use_safetensors=False asks for pickles, which are never opened")
    path = Path(folder)
    if not path.is_dir() or any(any(path.glob(pattern)) for pattern in _WEIGHTS):
        return
    found = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    also = f"; pickles are never opened ({', '.join(found)})" if found else ""
    raise CheckpointError(f"{path}: no model.safetensors; weights must be in safetensors files{also}")


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
