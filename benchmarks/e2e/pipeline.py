"""The measurements behind `storm_benchmarks.e2e`: a video through the complete model, timed by stage, in rounds.

What runs, for each number of frames: one round to warm up and ``repeat`` timed ones. In a round the
video is decoded, preprocessed and encoded once (every variant gets the same image tokens), then all
variants with all their kinds of projector take turns at projector and prefill. So whatever disturbs
the machine meets all of them, and ratios are made within rounds. Before the first round every fused
projector's output on this video is checked against float64. After each round the rows so far are
written.

Rows have the columns of harness.py and: preset, clip, looped (the clip is shorter than the frames
asked for), frames, stage ("vision", "projector/scan", ...; "total" is time to first token: vision +
projector + prefill; "wait" is decode + preprocess + total), variant and projector ("vila",
"reference", "fused"; both null in what all variants share), rounds_ms (one time a round), tokens
(video tokens to the LLM), kept_percent, checked_frames (of the check), ran (which backend ran each
operation of the fused projector; `backend` is the scan's). Rows of stage "decode" also:
wanted_frames (different ones) and decoded_frames (to find them). Rows of stage "total" also:
rounds_from (when the first round began; equal in all that took turns), waited_percent and cores
(reliability.py), not_reliable (why the figures must not be believed, or null). The last row of a
run that came to its end has the stage "run" and the mode "whole".
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from storm_model.presets import Variant
from storm_model.video import SampledVideo
from torch import Tensor

import storm_kernels
from storm_kernels.profiling import recording

from .. import environment, harness
from ..harness import MemoryMeter, Row, Rows
from . import models, summary
from .check import ProjectorCheck
from .reliability import Waiting
from .stages import StageClock
from .work import Progress, Settings, pass_operations, vision_operations

Times = dict[str, float]  # milliseconds by stage


@dataclass
class Rounds:
    """What has been measured at one number of frames. ``columns`` are those of a contender's row of stage "total"."""

    frames: int
    looped: bool
    began: str
    decoding: Row  # columns of the row of stage "decode"
    vision_memory: Row = field(default_factory=dict)
    columns: dict[tuple[str, str], Row] = field(default_factory=dict)
    shared: list[Times] = field(default_factory=list)
    taken: dict[tuple[str, str], list[Times]] = field(default_factory=dict)


class Run:
    """One run of the main job; after each round its rows are in ``rows``."""

    def __init__(self, settings: Settings, rows: Rows, progress: Progress):
        self.settings, self.rows, self.progress = settings, rows, progress
        self.clock = StageClock(settings.device)
        self.models = models.Models(settings.config, settings.device, settings.dtype)
        self._backend, self._ran = (
            "",
            "",
        )  # of the fused projector, once it has run: the scan's backend, and all operations'

    @torch.inference_mode()
    def measure(self) -> None:
        """Raises `harness.CheckFailed` if a fused projector is wrong,
        `storm_model.video.StormVideoError` for the video."""
        start = time.perf_counter()
        self._cold_start()
        for frames in self.settings.frames:
            self._in_rounds(frames)
        self.rows.append(
            self._row("run", max(self.settings.frames), False, [(time.perf_counter() - start) * 1e3], mode="whole"),
        )

    def _decode(self, frames: int) -> SampledVideo:
        self.progress.says(f"{frames} frames: decode")
        return self.settings.clip.sample(frames)

    def _cold_start(self) -> None:
        """Build the model, then the first pass with each kind of projector; rows of mode "cold"."""
        video = self._decode(self.settings.frames[0])
        frames, looped = len(video.indices), video.looped
        self.rows.append(self._row("open", frames, looped, [self.settings.clip.open_ms], mode="cold"))
        self.progress.says("build the model")
        start = time.perf_counter()
        for variant, kind in self.settings.first_of_each_kind():
            self.models.get(variant, kind)
        if self.settings.device.startswith("cuda"):
            torch.cuda.synchronize(self.settings.device)
        self.rows.append(self._row("build", frames, looped, [(time.perf_counter() - start) * 1e3], mode="cold"))
        for variant, kind in self.settings.first_of_each_kind():
            self.progress.says(f"cold start: {variant.title}, {kind} projector")
            storm_kernels.stats(reset=True)
            with recording(self.clock):
                self.models.first_token(variant, kind, self.models.encode(video.frames))
            taken = self.clock.take()
            if kind == "fused":
                ran = storm_kernels.stats()
                self._backend = "+".join(ran["scan"])
                self._ran = ", ".join(f"{op} {'+'.join(backends)}" for op, backends in ran.items())
            taken["total"] = sum(taken[stage] for stage in summary.TO_FIRST_TOKEN)
            stages = [stage for stage in taken if "/" not in stage]
            self.rows.append(*(self._row(s, frames, looped, [taken[s]], variant, kind, mode="cold") for s in stages))
            self.progress.did(
                pass_operations(self.settings, variant, kind, frames) + vision_operations(self.settings, frames),
            )

    def _in_rounds(self, frames: int) -> None:
        """All contenders at one number of frames: checked, warmed up, then in timed rounds, each
        written when it is over."""
        place = len(self.rows.rows)
        found, features = self._begin(frames)
        for key, memory in self._turns(found, features, "warm-up").items():
            found.columns[key] |= memory
        waiting = Waiting()
        for number in range(1, self.settings.repeat + 1):
            name = f"round {number} of {self.settings.repeat}"
            features = self._shared_stages(found, name)
            self._turns(found, features, name)
            self.rows.put(place, *self._rows_of(found, waiting.columns()))

    def _begin(self, frames: int) -> tuple[Rounds, Tensor]:
        """Warm up and measure the memory of vision; check every fused projector on the image
        tokens, which are returned too."""
        video = self._decode(frames)
        found = Rounds(frames, video.looped, environment.now(), self.settings.clip.decoding(video))
        self.progress.says(f"{frames} frames, warm-up: preprocess and vision")
        with MemoryMeter(self.settings.device) as memory:
            features = self.models.encode(video.frames)
        found.vision_memory = memory.columns()
        self.progress.did(vision_operations(self.settings, frames))
        check = None
        for variant, kind in self.settings.contenders():
            found.columns[variant.name, kind] = {}
            if kind == "fused":
                if check is None:
                    self.progress.says(f"{frames} frames: the projector in float64, to check against")
                    check = ProjectorCheck(self.models, variant, features)
                self.progress.says(f"{frames} frames: check {variant.title}, fused projector")
                found.columns[variant.name, kind] = check.check(variant) | {"ran": self._ran}
        return found, features

    def _shared_stages(self, found: Rounds, name: str) -> Tensor:
        """Decode, preprocess and encode, once for all contenders of this round -> image tokens."""
        with recording(self.clock):
            video = self._decode(found.frames)
            self.progress.says(f"{found.frames} frames, {name}: preprocess and vision")
            features = self.models.encode(video.frames)
        found.shared.append(self.clock.take())
        self.progress.did(vision_operations(self.settings, found.frames))
        return features

    def _turns(self, found: Rounds, features: Tensor, name: str) -> dict[tuple[str, str], Row]:
        """One turn of projector and prefill for each contender. The first call warms up, and gives
        the columns of memory: measuring that gives freed memory back first, which would slow a
        timed turn down."""
        warm_up, memories = not found.shared, {}
        for variant, kind in self.settings.contenders():
            self.progress.says(f"{found.frames} frames, {name}: {variant.title}, {kind} projector")
            with MemoryMeter(self.settings.device, measures=warm_up) as memory, recording(self.clock):
                self.models.first_token(variant, kind, features)
            taken, key = self.clock.take(), (variant.name, kind)
            if warm_up:
                memories[key] = _larger(memory.columns(), found.vision_memory)
            else:
                found.taken.setdefault(key, []).append(taken)
            self.progress.did(pass_operations(self.settings, variant, kind, found.frames))
        return memories

    def _rows_of(self, found: Rounds, waited: Row) -> list[Row]:
        times = {stage: [one[stage] for one in found.shared] for stage in found.shared[0]}
        more = {"decode": found.decoding}
        rows = [self._timed_row(stage, found, rounds, **more.get(stage, {})) for stage, rounds in times.items()]
        for variant, kind in self.settings.contenders():
            rows += self._rows_of_contender(found, variant, kind, waited)
        return summary.with_reliability(rows)

    def _rows_of_contender(self, found: Rounds, variant: Variant, kind: str, waited: Row) -> list[Row]:
        taken = found.taken[variant.name, kind]
        grid = self.settings.config.token_grid(found.frames)
        tokens = variant.reduction.reduced(grid).tokens
        kept = {"tokens": tokens, "kept_percent": round(100 * tokens / grid.tokens, 2)}
        times = {stage: [one[stage] for one in taken] for stage in taken[0]}
        rows = [self._timed_row(stage, found, rounds, variant, kind, **kept) for stage, rounds in times.items()]
        stages = [shared | one for shared, one in zip(found.shared, taken, strict=True)]
        total = [sum(one[stage] for stage in summary.TO_FIRST_TOKEN) for one in stages]
        wait = [sum(one[stage] for stage in (*summary.BEFORE, *summary.TO_FIRST_TOKEN)) for one in stages]
        columns = found.columns[variant.name, kind] | waited | {"rounds_from": found.began}
        rows.append(self._timed_row("total", found, total, variant, kind, **kept, **columns))
        return [*rows, self._timed_row("wait", found, wait, variant, kind, **kept)]

    @torch.inference_mode()
    def trace(self, path: Path) -> None:
        """One pass of the last variant with each of its kinds of projector, at the fewest frames,
        as a Perfetto trace. After `measure`."""
        video, last = self.settings.clip.sample(self.settings.frames[0]), self.settings.variants[-1]
        with torch.profiler.profile() as profiler, recording(torch.profiler.record_function):
            for variant, kind in self.settings.contenders():
                if variant is last:
                    with torch.profiler.record_function(f"{variant.name}, {kind} projector"):
                        self.models.first_token(variant, kind, self.models.encode(video.frames))
        beside = path.with_name(f"partial-{path.name}")
        try:
            profiler.export_chrome_trace(str(beside))
            beside.replace(path)
        except OSError as error:  # of a write, it names no file
            raise OSError(error.errno, error.strerror, str(path)) from None
        finally:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)

    def _timed_row(self, stage: str, found: Rounds, rounds: list[float], *whose, **more) -> Row:
        """``whose``: variant and kind of projector, as `_row` takes them."""
        each = [round(ms, 4) for ms in rounds]
        return self._row(stage, found.frames, found.looped, rounds, *whose, rounds_ms=each, **more)

    def _row(
        self,
        stage: str,
        frames: int,
        looped: bool,
        samples: list[float],
        variant: Variant | None = None,
        kind: str | None = None,
        **more,
    ) -> Row:
        what = {
            "preset": self.settings.config.name_or_path,
            "clip": self.settings.clip.name,
            "looped": looped,
            "frames": frames,
            "stage": stage,
        }
        what |= {"variant": variant.name if variant else None, "projector": kind}
        backend, mode = self._backend if kind == "fused" else "torch", more.pop("mode", "forward")
        return harness.row(
            "e2e",
            backend,
            mode,
            f"frames={frames}",
            self.settings.dtype,
            samples,
            device=self.settings.device,
            **what,
            **more,
        )


def _larger(memory: Row, vision: Row) -> Row:
    """The peak of a whole pass: that of projector and prefill, or of vision before them."""
    if memory["peak_bytes"] is None or vision["peak_bytes"] is None:
        return memory
    return {
        **memory,
        "peak_bytes": max(memory["peak_bytes"], vision["held_bytes"] + vision["peak_bytes"] - memory["held_bytes"]),
    }
