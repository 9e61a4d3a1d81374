"""The only door from the main job to the models: building them, their stages, what their weights take."""

from __future__ import annotations

import torch
from storm_model.arithmetic import arithmetic
from storm_model.config import ModelConfig, Variant
from storm_model.pixels import preprocess
from storm_model.storm import VideoModel
from torch import Tensor

from storm_kernels.tokens import TokenReduction

PROMPT_TOKENS = 16


class Models:
    """One model in every variant and kind of projector ("vila", "reference", "fused"); all share
    their weights. Built when first asked for."""

    def __init__(self, config: ModelConfig, device: str, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, device, dtype
        self.prompt = torch.arange(1, PROMPT_TOKENS + 1, device=device) % config.language.vocabulary
        self._built: dict[tuple[str, str], VideoModel] = {}

    def get(self, variant: Variant, kind: str) -> VideoModel:
        if (variant.name, kind) not in self._built:
            self._built[variant.name, kind] = self._build(variant, "fused" if kind == "fused" else "reference")
        return self._built[variant.name, kind]

    def _build(self, variant: Variant, form: str) -> VideoModel:
        same_projector = [model for model in self._built.values() if model.variant.temporal == variant.temporal]
        for like in same_projector or self._built.values():
            return like.switched(variant, form)
        return VideoModel(self.config, variant, form, device=self.device, dtype=self.dtype)

    def pixels(self, frames: Tensor) -> Tensor:
        """Decoded frames (n, H, W, 3) uint8 -> the vision tower's input, on the device. Recorded as "preprocess"."""
        return preprocess(frames.to(self.device), self.config.vision.image_size, self.dtype)

    def encode(self, frames: Tensor) -> Tensor:
        """Decoded frames -> image tokens (1, n, h, w, Dv), the same for every variant. Recorded as
        "preprocess" and "vision"."""
        return next(iter(self._built.values())).encode(self.pixels(frames))

    def first_token(self, variant: Variant, kind: str, features: Tensor) -> None:
        """Image tokens -> the logits of the first token. Recorded as "projector" and "prefill"."""
        model = self.get(variant, kind)
        model.prefill(model.project(features), self.prompt)

    def project(self, variant: Variant, kind: str, features: Tensor) -> Tensor:
        """Image tokens -> video tokens (1, tokens, D)."""
        return self.get(variant, kind).projector(features, variant.reduction)

    def unreduced_projector(self, variant: Variant):
        """The reference projector of ``variant``'s weights, as a module of (features,
        `TokenReduction`), and what it takes to keep every token."""
        return self.get(variant, "reference").projector, TokenReduction()


def weight_bytes(config: ModelConfig, dtype: torch.dtype, variants: tuple[Variant, ...]) -> int:
    """Bytes of all weights of `Models` with these variants, counted on the meta device: nothing is allocated."""
    models = Models(config, "meta", dtype)
    parameters = {id(p): p for variant in variants for p in models.get(variant, "reference").parameters()}
    return sum(p.numel() * p.element_size() for p in parameters.values())


def operations(config: ModelConfig, variant: Variant, frames: int) -> dict[str, int]:
    """Operations to the first token by "vision", "projector" and "language": what the time that is
    left is reckoned from."""
    return arithmetic(config, variant, frames, PROMPT_TOKENS)
