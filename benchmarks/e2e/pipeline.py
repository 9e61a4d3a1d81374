"""The measurements behind `storm_benchmarks.e2e`: a video through the complete model, timed by stage.

What runs: decoding once; preprocessing and vision once to warm up and ``repeat`` times more for each number of frames (every variant gets the same
image tokens, so their time is shared); then, for each variant, projector and prefill once to warm up and ``repeat`` times more, the reference and
the fused projector taking turns. Before a fused projector is timed, its output on this video is checked against float64.
Rows have the columns of harness.py and: preset, clip, looped (the clip is shorter than the frames asked for), frames, stage ("vision",
"projector/scan", ...; "total" is time to first token: vision + projector + prefill), variant and projector ("vila", "reference", "fused"; both
null in what all variants share), tokens (video tokens to the LLM), kept_percent, checked_frames (of the check), ran (which backend ran each
operation of the fused projector; `backend` is the scan's).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from storm_model.arithmetic import arithmetic
from storm_model.config import ModelConfig, Variant
from storm_model.storm import VideoModel
from storm_model.video import SampledVideo, sample_frames
from storm_model.vision import preprocess
from torch import Tensor

import storm_kernels
from storm_kernels.profiling import recording

from .. import harness
from ..harness import MemoryMeter, Row
from .check import ProjectorCheck
from .stages import StageClock

PROMPT_TOKENS = 16
# How much longer the reference projector takes for its arithmetic than a matrix product does: it loops over tokens. For the ETA only.
REFERENCE_SLOWNESS = 10


@dataclass(frozen=True)
class Settings:
    video: Path
    config: ModelConfig
    frames: tuple[int, ...]
    variants: tuple[Variant, ...]
    projectors: tuple[str, ...]  # of "reference", "fused"; the VILA baseline has one form
    device: str
    dtype: torch.dtype
    repeat: int

    def kinds(self, variant: Variant) -> tuple[str, ...]:
        return self.projectors if variant.temporal else ("vila",)


@dataclass(frozen=True)
class Progress:
    """Where a run tells how far it is: ``says(what)`` begins something, ``did(operations)`` counts what is done of `operations(settings)`."""

    says: Callable[[str], None]
    did: Callable[[float], None]


def operations(settings: Settings) -> float:
    """The work of a whole run, in the unit of `Progress.did`: roughly the operations of a matrix product."""
    passes = settings.repeat + 1
    first = sum(_pass_operations(settings, v, kind, min(settings.frames)) for v, kind in _cold_passes(settings))
    first += len(_cold_passes(settings)) * _vision_operations(settings, min(settings.frames))
    for frames in settings.frames:
        first += passes * _vision_operations(settings, frames)
        first += passes * sum(_pass_operations(settings, v, kind, frames) for v in settings.variants for kind in settings.kinds(v))
    return first


def _vision_operations(settings: Settings, frames: int) -> float:
    return arithmetic(settings.config, settings.variants[0], frames)["vision"]


def _pass_operations(settings: Settings, variant: Variant, kind: str, frames: int) -> float:
    counts = arithmetic(settings.config, variant, frames, PROMPT_TOKENS)
    return counts["language"] + counts["projector"] * (REFERENCE_SLOWNESS if kind == "reference" else 1)


def _cold_passes(settings: Settings) -> list[tuple[Variant, str]]:
    """The first variant that each kind of projector runs in."""
    found: dict[str, Variant] = {}
    for variant in settings.variants:
        for kind in settings.kinds(variant):
            found.setdefault(kind, variant)
    return [(variant, kind) for kind, variant in found.items()]


class Run:
    """One run of the main job: `measure` hands each finished measurement's rows to ``record`` at once."""

    def __init__(self, settings: Settings, record: Callable[..., None], progress: Progress):
        self.settings, self.record, self.progress = settings, record, progress
        self.clock = StageClock(settings.device)
        self.prompt = torch.arange(1, PROMPT_TOKENS + 1, device=settings.device) % settings.config.language.vocabulary
        self._built: dict[bool, VideoModel] = {}  # temporal -> a model with that projector's weights
        self._backend, self._ran = "", ""  # of the fused projector, once it has run: the scan's backend, and all operations'

    @torch.inference_mode()
    def measure(self) -> None:
        """Raises `harness.CheckFailed` if a fused projector is wrong, `model.video.StormVideoError` for the video."""
        video = self._decode(self.settings.frames[0])
        self._cold_start(video)
        for frames in self.settings.frames:
            video = video if frames == len(video.indices) else self._decode(frames)
            features, vision = self._shared_stages(video)
            check = self._projector_check(features)
            for variant in self.settings.variants:
                self._variant(variant, video, features, vision, check)

    def _decode(self, frames: int) -> SampledVideo:
        self.progress.says(f"{frames} frames: decode")
        with recording(self.clock):
            video = sample_frames(self.settings.video, frames)
        self.record(self._row("decode", video, [self.clock.take()["decode"]]))
        return video

    def _cold_start(self, video: SampledVideo) -> None:
        """Build the model, then the first pass with each kind of projector; rows of mode "cold"."""
        self.progress.says("build the model")
        start = time.perf_counter()
        models = [(variant, kind, self._model(variant, kind)) for variant, kind in _cold_passes(self.settings)]
        if self.settings.device.startswith("cuda"):
            torch.cuda.synchronize(self.settings.device)
        self.record(self._row("build", video, [(time.perf_counter() - start) * 1e3], mode="cold"))
        for variant, kind, model in models:
            self.progress.says(f"cold start: {variant.title}, {kind} projector")
            storm_kernels.stats(reset=True)
            with recording(self.clock):
                model(self._pixels(video), self.prompt)
            taken = self.clock.take()
            if kind == "fused":
                ran = storm_kernels.stats()
                self._backend = "+".join(ran["scan"])
                self._ran = ", ".join(f"{op} {'+'.join(backends)}" for op, backends in ran.items())
            taken["total"] = sum(taken[stage] for stage in ("vision", "projector", "prefill"))
            self.record(*(self._row(stage, video, [ms], variant, kind, mode="cold") for stage, ms in taken.items() if "/" not in stage))
            self._did_pass(variant, kind, len(video.indices))
            self.progress.did(_vision_operations(self.settings, len(video.indices)))

    def _model(self, variant: Variant, kind: str) -> VideoModel:
        """The model with that variant and kind of projector; all share their weights."""
        form = "fused" if kind == "fused" else "reference"
        like = self._built.get(variant.temporal) or next(iter(self._built.values()), None)
        if like is None:
            model = VideoModel(self.settings.config, variant, form, device=self.settings.device, dtype=self.settings.dtype)
        else:
            model = like.switched(variant, form)
        self._built.setdefault(variant.temporal, model)
        return model

    def _projector_check(self, features: Tensor) -> ProjectorCheck | None:
        timed_fused = next((variant for variant in self.settings.variants if "fused" in self.settings.kinds(variant)), None)
        if timed_fused is None:
            return None
        self.progress.says(f"{features.shape[1]} frames: the projector in float64, to check against")
        return ProjectorCheck(self._model(timed_fused, "reference"), features)

    def _shared_stages(self, video: SampledVideo) -> tuple[Tensor, Row]:
        """Preprocess and encode, recorded once for all variants -> image tokens, and the row of the vision stage."""
        frames, passes = len(video.indices), []
        self.progress.says(f"{frames} frames: preprocess and vision")
        model = next(iter(self._built.values()))
        for number in range(self.settings.repeat + 1):
            with self._memory_of(number) as memory, recording(self.clock):
                features = model.encode(self._pixels(video))
            passes.append(self.clock.take())
            if number == 0:
                peak = memory.columns()
            self.progress.did(_vision_operations(self.settings, frames))
        timed = passes[1:]
        vision = self._row("vision", video, [one["vision"] for one in timed], **peak)
        self.record(self._row("preprocess", video, [one["preprocess"] for one in timed]), vision)
        return features, vision

    def _variant(self, variant: Variant, video: SampledVideo, features: Tensor, vision: Row, check: ProjectorCheck | None) -> None:
        """Projector and prefill of one variant; its kinds of projector take turns."""
        frames, models = features.shape[1], {kind: self._model(variant, kind) for kind in self.settings.kinds(variant)}
        passes: dict[str, list[dict[str, float]]] = {kind: [] for kind in models}
        columns: dict[str, Row] = {kind: {} for kind in models}
        if "fused" in models:
            self.progress.says(f"{frames} frames: check {variant.title}, fused projector")
            columns["fused"] = check.check(models["fused"]) | {"ran": self._ran}
        for number in range(self.settings.repeat + 1):
            for kind, model in models.items():
                self.progress.says(f"{frames} frames: {variant.title}, {kind} projector, pass {number} of {self.settings.repeat}")
                with self._memory_of(number) as memory, recording(self.clock):
                    model.prefill(model.project(features), self.prompt)
                passes[kind].append(self.clock.take())
                if number == 0:
                    columns[kind] |= _larger(memory.columns(), vision)
                self._did_pass(variant, kind, frames)
        for kind in models:
            self._record_variant(variant, kind, video, vision, passes[kind][1:], columns[kind])

    def _record_variant(self, variant: Variant, kind: str, video: SampledVideo, vision: Row, timed: list[dict[str, float]], columns: Row) -> None:
        grid = self.settings.config.token_grid(len(video.indices))
        tokens = variant.reduction.reduced(grid).tokens
        kept = {"tokens": tokens, "kept_percent": round(100 * tokens / grid.tokens, 2)}
        rows = [self._row(stage, video, [one[stage] for one in timed], variant, kind, **kept) for stage in timed[0]]
        total = [vision["p50_ms"] + one["projector"] + one["prefill"] for one in timed]
        self.record(*rows, self._row("total", video, total, variant, kind, **kept, **columns))

    @torch.inference_mode()
    def trace(self, path: Path) -> None:
        """One pass of the last variant with each of its kinds of projector, at the fewest frames, as a Perfetto trace. After `measure`."""
        video, variant = sample_frames(self.settings.video, self.settings.frames[0]), self.settings.variants[-1]
        with torch.profiler.profile() as profiler, recording(torch.profiler.record_function):
            for kind in self.settings.kinds(variant):
                with torch.profiler.record_function(f"{variant.name}, {kind} projector"):
                    self._model(variant, kind)(self._pixels(video), self.prompt)
        beside = path.with_name(f"partial-{path.name}")
        profiler.export_chrome_trace(str(beside))
        beside.replace(path)

    def _pixels(self, video: SampledVideo) -> Tensor:
        return preprocess(video.frames.to(self.settings.device), self.settings.config.vision.image_size, self.settings.dtype)

    def _row(self, stage: str, video: SampledVideo, samples: list[float], variant: Variant | None = None, kind: str | None = None, **more) -> Row:
        frames = len(video.indices)
        what = {"preset": self.settings.config.name, "clip": Path(self.settings.video).name, "looped": video.looped, "frames": frames, "stage": stage}
        what |= {"variant": variant.name if variant else None, "projector": kind}
        backend, mode = self._backend if kind == "fused" else "torch", more.pop("mode", "forward")
        return harness.row("e2e", backend, mode, f"frames={frames}", self.settings.dtype, samples, device=self.settings.device, **what, **more)

    def _memory_of(self, number: int) -> MemoryMeter:
        """Of the warm-up pass only: measuring gives freed memory back first, which would slow a timed pass down."""
        return MemoryMeter(self.settings.device, measures=number == 0)

    def _did_pass(self, variant: Variant, kind: str, frames: int) -> None:
        self.progress.did(_pass_operations(self.settings, variant, kind, frames))


def _larger(memory: Row, vision: Row) -> Row:
    """The peak of a whole pass: that of projector and prefill, or of vision before them."""
    if memory["peak_bytes"] is None or vision["peak_bytes"] is None:
        return memory
    return {**memory, "peak_bytes": max(memory["peak_bytes"], vision["held_bytes"] + vision["peak_bytes"] - memory["held_bytes"])}
