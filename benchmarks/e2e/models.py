"""The only door from the main job to the models: building them, their stages, what their weights take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from storm_model import StormConfig, StormForConditionalGeneration
from storm_model.arithmetic import arithmetic
from storm_model.pixels import preprocess
from storm_model.presets import Variant
from storm_model.projector import build_projector
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from storm_kernels.tokens import TokenReduction

PROMPT_TOKENS = 16
SEED = 0


class Models:
    """One model with random weights, whose projector is changed to each kind ("vila", "reference", "fused").

    The tower and the language model are the same for all; "reference" and "fused" share their
    weights. Built when first asked for.
    """

    def __init__(self, config: StormConfig, device: str, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, torch.device(device), dtype
        self.prompt = torch.arange(1, PROMPT_TOKENS + 1, device=device) % config.text_config.vocab_size
        self.model: StormForConditionalGeneration | None = None
        self._projectors: dict[str, nn.Module] = {}

    def get(self, variant: Variant, kind: str) -> StormForConditionalGeneration:
        """The model, with the projector of that kind in it."""
        if kind not in self._projectors:
            self._projectors[kind] = self._built(variant.of(self.config, "fused" if kind == "fused" else "reference"))
        self.model.model.projector = self._projectors[kind]
        return self.model

    def _built(self, config: StormConfig) -> nn.Module:
        if self.model is None:
            with _seeded(SEED, self.device):
                self.model = StormForConditionalGeneration._from_config(config, dtype=self.dtype).eval()
            return self.model.model.projector
        twins = {"reference", "fused"} & self._projectors.keys()
        if config.projector_type == "storm" and twins:
            projector = build_projector(config, device="meta", dtype=self.dtype)
            projector.load_state_dict(self._projectors[twins.pop()].state_dict(keep_vars=True), assign=True)
            return projector.eval()
        with _seeded(SEED + 1, self.device):
            return build_projector(config, device=self.device, dtype=self.dtype).eval()

    def pixels(self, frames: Tensor) -> Tensor:
        """Decoded frames (n, H, W, 3) uint8 -> the vision tower's input, on the device. Recorded as "preprocess"."""
        return preprocess(frames.to(self.device), self.config.vision_config.image_size, self.dtype)

    def encode(self, frames: Tensor) -> Tensor:
        """Decoded frames -> image tokens (n, h, w, Dv), the same for every variant. Recorded as
        "preprocess" and "vision"."""
        return self.model.model.encode(self.pixels(frames))

    def first_token(self, variant: Variant, kind: str, features: Tensor) -> Tensor:
        """Image tokens -> the logits of the first token (1, 1, vocabulary). Recorded as "projector" and "prefill"."""
        tokens = self.project(variant, kind, features)
        places = self.prompt.new_full((len(tokens),), self.config.video_token_id)
        return self.model(
            input_ids=torch.cat([places, self.prompt])[None],
            mm_encoder_outputs={"video": BaseModelOutputWithPooling(pooler_output=[tokens])},
            use_cache=True,
            logits_to_keep=1,
        ).logits

    def project(self, variant: Variant, kind: str, features: Tensor) -> Tensor:
        """Image tokens -> video tokens (tokens, D)."""
        return self.get(variant, kind).model.project(features, [len(features)], [variant.reduction])[0]

    def unreduced_projector(self, variant: Variant):
        """The reference projector of ``variant``'s weights, as a module of (features,
        `TokenReduction`), and what it takes to keep every token."""
        return self.get(variant, "reference").model.projector, TokenReduction()


def weight_bytes(config: StormConfig, dtype: torch.dtype, variants: tuple[Variant, ...]) -> int:
    """Bytes of all weights of `Models` with these variants, counted on the meta device: nothing is allocated."""
    models = Models(config, "meta", dtype)
    parameters = {id(p): p for variant in variants for p in models.get(variant, _plain(variant)).parameters()}
    return sum(p.numel() * p.element_size() for p in parameters.values())


def operations(config: StormConfig, variant: Variant, frames: int) -> dict[str, int]:
    """Operations to the first token by "vision", "projector" and "language": what the time that is
    left is reckoned from."""
    return arithmetic(variant.of(config), frames, PROMPT_TOKENS)


def _plain(variant: Variant) -> str:
    return "reference" if variant.temporal else "vila"


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, random numbers follow from ``seed`` and new tensors land on ``device``; outside, the
    caller's random state is as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        yield
