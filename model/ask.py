"""``storm-kernels ask VIDEO "QUESTION" --model DIR``: the answer, word by word; what is being done,
and how long it took, beside it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer

from storm_kernels.profiling import recording

from .command import add_reduction, say, told
from .loading import FLOATS
from .modeling_storm import StormForConditionalGeneration

# What one sees happen, in its order; the stages inside these are left out.
_SHOWN = {
    "decode": "reading the video",
    "preprocess": "preparing frames",
    "vision": "encoding frames",
    "projector": "projecting",
}
_SHOWN |= {"prefill": "reading the prompt"}


class Clock:
    """A recorder of stages: says on standard error what begins, and keeps the seconds of each."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Around the stage ``name``."""
        if name in _SHOWN and name not in self.seconds:
            say(f"{_SHOWN[name]} ...")
        start = time.perf_counter()
        yield
        if self._device.type == "cuda" and name in _SHOWN | {"token": ""}:
            torch.cuda.synchronize(
                self._device
            )  # work is queued there; without this its time would be the next stage's
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def cli(arguments: list[str], prog: str = "storm-kernels ask") -> int:
    """Exit status: 0; 2 bad input, told in one line; 130 Ctrl-C."""
    options = _parser(prog).parse_args(arguments)
    return told(lambda: _ask(options))


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Ask a model a question about a video.")
    parser.add_argument("video", help="a video file, an address, or a folder of images")
    parser.add_argument("question")
    add_model(parser)
    parser.add_argument("--start", type=float, help="seconds; what is shown before is left out")
    parser.add_argument("--end", type=float, help="seconds; what is shown after is left out")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="the answer's longest length (256)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ..."
    )
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options that choose a model, and frames for it: what `load` and the processor take."""
    parser.add_argument("--model", required=True, help="a folder that save_pretrained of model and processor wrote")
    parser.add_argument("--dtype", choices=FLOATS, help="of the weights (default: as they are stored)")
    parser.add_argument("--frames", type=int, help="frames at even distances in time (default: the folder's)")
    parser.add_argument("--fps", type=float, help="frames a second, in place of --frames")
    parser.add_argument("--max-frames", type=int, help="with --fps: at most so many")
    add_reduction(parser, None, "default: the folder's")


def _ask(options: argparse.Namespace) -> int:
    if "://" not in options.video and not Path(options.video).exists():
        raise ValueError(f"{options.video}: no such file")
    processor, model = load(options.model, options.dtype, options.device)
    content = [{"type": "video", "path": options.video}, {"type": "text", "text": options.question}]
    clock, begun = Clock(model.device), time.perf_counter()
    with recording(clock):
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=_choice(options),
        )
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        model.generate(**inputs.to(model.device), max_new_tokens=options.max_new_tokens, streamer=streamer)
    frames, tokens = (
        inputs["pixel_values_videos"].shape[1],
        int((inputs["input_ids"] == model.config.video_token_id).sum()),
    )
    stages = ", ".join(f"{name} {clock.seconds[name]:.2f}" for name in (*_SHOWN, "token") if name in clock.seconds)
    say(f"{frames} frames, {tokens} video tokens, {time.perf_counter() - begun:.2f} s: {stages}")
    return 0


def load(folder: str, dtype: str | None, device: str) -> tuple[Any, StormForConditionalGeneration]:
    """The processor and the model of a folder, ready to infer; raise, by the option's name, where it has none.

    Args:
        folder: of ``--model``.
        dtype: of the weights, by name; None is as they are stored.
        device: where the model goes.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"--model: {folder} is not a folder")
    say("loading the model ...")
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto" if dtype is None else FLOATS[dtype])
    if not isinstance(model, StormForConditionalGeneration):
        raise ValueError(f"--model: {folder} holds a {type(model).__name__}, not a STORM or VILA of this package")
    return processor, model.to(device).eval()  # type: ignore[arg-type]  # transformers wraps Module.to


def _choice(options: argparse.Namespace) -> dict[str, int | float]:
    """What the command line says of the frames and their reduction, as the processor calls it."""
    names = ("fps", "max_frames", "start", "end", "temporal_pool", "spatial_pool", "temporal_stride")
    chosen = {"num_frames": options.frames} | {name: getattr(options, name) for name in names}
    return {name: value for name, value in chosen.items() if value is not None}
