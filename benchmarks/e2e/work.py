"""What one run of the main job is to measure, and how much work that is: the unit of its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from storm_model import StormConfig
from storm_model.presets import Variant

from . import models
from .clip import Clip

# How much longer the reference projector takes for its arithmetic than a matrix product does: it
# loops over tokens. For the ETA only.
REFERENCE_SLOWNESS = 10


@dataclass(frozen=True)
class Settings:
    clip: Clip
    config: StormConfig
    frames: tuple[int, ...]
    variants: tuple[Variant, ...]
    projectors: tuple[str, ...]  # of "reference", "fused"; the VILA baseline has one form
    device: str
    dtype: torch.dtype
    repeat: int

    def contenders(self) -> list[tuple[Variant, str]]:
        """Every variant with each of its kinds of projector, in the order in which they take turns."""
        kinds = {True: self.projectors, False: ("vila",)}
        return [(variant, kind) for variant in self.variants for kind in kinds[variant.temporal]]

    def first_of_each_kind(self) -> list[tuple[Variant, str]]:
        found: dict[str, Variant] = {}
        for variant, kind in self.contenders():
            found.setdefault(kind, variant)
        return [(variant, kind) for kind, variant in found.items()]


@dataclass(frozen=True)
class Progress:
    """Where a run tells how far it is: ``says(what)`` begins something, ``did(operations)`` counts
    what is done of `operations(settings)`."""

    says: Callable[[str], None]
    did: Callable[[float], None]


def operations(settings: Settings) -> float:
    """The work of a whole run, in the unit of `Progress.did`: roughly the operations of a matrix product."""
    first, vision = min(settings.frames), {frames: vision_operations(settings, frames) for frames in settings.frames}
    cold = sum(vision[first] + pass_operations(settings, *one, first) for one in settings.first_of_each_kind())
    turns = {n: sum(pass_operations(settings, *one, n) for one in settings.contenders()) for n in settings.frames}
    rounds = sum(vision.values()) + sum(turns.values())
    return cold + (settings.repeat + 1) * rounds


def vision_operations(settings: Settings, frames: int) -> float:
    return models.operations(settings.config, settings.variants[0], frames)["vision"]


def pass_operations(settings: Settings, variant: Variant, kind: str, frames: int) -> float:
    counts = models.operations(settings.config, variant, frames)
    return counts["language"] + counts["projector"] * (REFERENCE_SLOWNESS if kind == "reference" else 1)
