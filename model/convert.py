"""``storm-kernels convert``: a VILA or NVILA folder (arXiv 2412.04468) to one that transformers loads.

Such a folder holds ``config.json`` and the parts ``llm/``, ``vision_tower/`` and ``mm_projector/``,
each with a configuration and weights of its own (github.com/NVlabs/VILA, llava/model).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .assembling import (
    assemble,
    check_local,
    load_language,
    load_tokenizer,
    load_tower,
    new_folder,
    processor_of,
    read_config,
    read_json,
)
from .build import add_out, write
from .command import say, told
from .loading import FLOATS, CheckpointError, check_weights, not_finite, raise_problems
from .processing_storm import chat_template
from .projector import VilaProjector

PROJECTOR_TYPE = "mlp_downsample_2x2_fix"
_TWO_ORDERS = (
    "VILA's releases put its tokens in two orders, by columns and since NVILA by rows, and a folder does not say which"
)
_PARTS = ("llm", "vision_tower", "mm_projector")
# Of config.json: what another way of looking at an image, or at a video, than ours is called.
_OTHER_WAYS = ("s2", "dynamic_s2", "ps3", "mm_use_im_start_end")
# Pictures resized to a square; "dynamic" does so with the frames of a video, and cuts only images to tiles.
_ASPECT_RATIOS = (None, "resize", "dynamic")
_BASIC, _POOLING = ("BasicImageEncoder", "BasicVideoEncoder"), "TSPVideoEncoder"


@dataclass(frozen=True)
class _Way:
    """How a VILA folder looks at a video, as far as our model and processor do the same."""

    layer: int  # of the tower, from the end
    reduction: dict[str, int]
    separator: str  # text after each frame
    frames: int | None  # of a video, where a call chooses none
    template: str | None  # the chat template's name
    notes: list[str]  # what is done otherwise, for whoever compares the two


def cli(arguments: list[str], prog: str = "storm-kernels convert") -> int:
    """Exit status: 0; 2 bad input, told in one line; 130 Ctrl-C."""
    parser = argparse.ArgumentParser(prog=prog, description="Make a model's folder from a VILA or NVILA folder.")
    parser.add_argument("folder", type=Path, help="with config.json, llm/, vision_tower/ and mm_projector/")
    add_out(parser)
    options = parser.parse_args(arguments)
    return told(lambda: _convert(options.folder, options.out, FLOATS.get(options.dtype, "auto")))


def _convert(source: Path, out: Path, dtype: torch.dtype | str) -> int:
    way = _way(source)
    with new_folder(out) as folder:
        say(f"reading {source / 'vision_tower'} ...")
        tower = load_tower(source / "vision_tower", way.layer)
        widths = (tower.config.hidden_size, read_config(source / "llm").hidden_size)
        projector = _projector(source / "mm_projector", *widths)
        say(f"reading {source / 'llm'} ...")
        tokenizer = load_tokenizer(source / "llm")
        language = load_language(source / "llm", dtype)
        model = assemble(tower, language, tokenizer, projector, projector_type="vila", **way.reduction)
        tokenizer.chat_template = _own_template(source, way.template) or tokenizer.chat_template
        # VILA puts nothing between a video and the text that follows it.
        template = chat_template(tokenizer, after_media="")
        frames = {"num_frames": way.frames} if way.frames else {}
        processor = processor_of(model, tokenizer, template, way.separator, **frames)
        processor.image_processor.spatial_pool = 1  # VILA pools videos only
        made = write(model, processor, folder)
    print(f"{out}: {made}")
    for note in way.notes:
        say(note)
    return 0


def _way(source: Path) -> _Way:
    """What config.json says; raise, by name, for what our model and processor cannot do."""
    check_local(source)
    config = read_json(source / "config.json")
    missing = [f"no folder {name}" for name in _PARTS if not (source / name).is_dir()]
    raise_problems(source, missing)
    problems = [f"{name} {config[name]!r} has no counterpart here" for name in _OTHER_WAYS if config.get(name)]
    feature = config.get("mm_vision_select_feature", "cls_patch")
    if feature != "cls_patch":
        problems.append(f"mm_vision_select_feature must be 'cls_patch', every token of the tower, got {feature!r}")
    ratio = config.get("image_aspect_ratio")
    if ratio not in _ASPECT_RATIOS:
        problems.append(f"image_aspect_ratio must be 'resize' or 'dynamic', got {ratio!r}")
    if ratio == "dynamic" and (config.get("video_max_tiles") or 1) != 1:
        problems.append(f"video_max_tiles {config['video_max_tiles']!r} cuts frames to tiles, which we do not")
    layer, frames = config.get("mm_vision_select_layer"), config.get("num_video_frames")
    if frames is not None and (type(frames) is not int or frames < 1):
        problems.append(f"num_video_frames must be a positive integer, got {frames!r}")
    raise_problems(source / "config.json", problems)
    separator, reduction = _encoders(source, config)
    notes = _notes(ratio, config.get("fps"), frames)
    return _Way(-2 if layer is None else layer, reduction, separator, frames, config.get("chat_template"), notes)


def _notes(ratio: str | None, fps: Any, frames: int | None) -> list[str]:
    notes = ["images are taken whole, where VILA also cuts them to tiles"] if ratio == "dynamic" else []
    if fps:
        notes.append(f"VILA takes {fps} frames a second, at most {frames}: here a call says so, by fps and max_frames")
    return notes


def _encoders(source: Path, config: dict[str, Any]) -> tuple[str, dict[str, int]]:
    """The text after each frame, and the token reduction, from what VILA calls encoders of images and videos."""
    path, ends, reduction = source / "config.json", [], {}
    for kind in ("image_encoder", "video_encoder"):
        encoder = _object(path, kind, config.get(kind) or {})
        name = encoder.pop("_target_", _BASIC[kind == "video_encoder"]).rpartition(".")[2]
        ends.append(encoder.pop("end_tokens", "\n") or "")
        if name == _POOLING:
            reduction = _pooling(path, encoder.pop("pool_sizes", None))
        elif name not in _BASIC:
            raise CheckpointError(f"{path}: {kind} must be one of {', '.join((*_BASIC, _POOLING))}, got {name}")
        left = [f"{kind} has {key} {value!r}, which has no counterpart here" for key, value in encoder.items() if value]
        raise_problems(path, left)
    if ends[0] != ends[1]:
        raise CheckpointError(f"{path}: images and frames must end with the same text, got {ends[0]!r} and {ends[1]!r}")
    return ends[0], reduction


def _object(path: Path, name: str, given: Any) -> dict[str, Any]:
    """A copy of a field that is an object, or one written as JSON in a string, as VILA has it."""
    try:
        return dict(json.loads(given) if isinstance(given, str) else given)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {name} is not JSON of an object: {given!r}") from error


def _pooling(path: Path, sizes: Any) -> dict[str, int]:
    """VILA's pooling over (time, height, width) as our reduction."""
    if not isinstance(sizes, list) or len(sizes) != 1 or len(sizes[0]) != 3 or sizes[0][1] != sizes[0][2]:
        raise CheckpointError(
            f"{path}: video_encoder's pool_sizes must be one [time, side, side], got {json.dumps(sizes)}"
        )
    return {"temporal_pool": sizes[0][0], "spatial_pool": sizes[0][1]}


def _projector(folder: Path, vision_width: int, d_model: int) -> VilaProjector:
    """VILA's projector with the weights of ``folder``.

    Raises:
        CheckpointError: another projector than ours, or tensors that do not fit.
    """
    kind = read_json(folder / "config.json").get("mm_projector_type")
    if kind != PROJECTOR_TYPE:
        also = f": {_TWO_ORDERS}" if kind == "mlp_downsample" else ""
        raise CheckpointError(f"{folder}: mm_projector_type must be {PROJECTOR_TYPE!r}, got {kind!r}{also}")
    stored = {name: tensor for file in check_weights(folder) for name, tensor in load_file(file).items()}
    with torch.device("meta"):
        projector = VilaProjector(vision_width, d_model)
    wanted = projector.state_dict()
    problems = [f"{name} is missing" for name in wanted if name not in stored]
    problems += [f"{name} is not part of VILA's projector" for name in stored if name not in wanted]
    problems += [
        f"{name} has shape {tuple(stored[name].shape)}, the model's has {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in stored and stored[name].shape != tensor.shape
    ]
    raise_problems(folder, problems)
    projector.load_state_dict(stored, assign=True)
    raise_problems(folder, [f"{name} holds values that are not finite" for name in not_finite(projector)])
    return projector


def _own_template(source: Path, name: str | None) -> str | None:
    """The chat template that config.json names, from the file of that name; VILA drops its line breaks and indents."""
    if name is None:
        return None
    path = source / f"{name}.jinja"
    if Path(name).name != name or not path.is_file():
        raise CheckpointError(f"{source / 'config.json'}: chat_template {name!r} is named, but there is no {path.name}")
    return path.read_text(encoding="utf-8").replace("    ", "").replace("\n", "")
