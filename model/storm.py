"""The complete model: vision tower, projector, language model; STORM's or VILA's by the variant
(docs/spec.md, "The models to compare").
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import storm_kernels
from storm_kernels.profiling import stage
from storm_kernels.reference import ReferenceTemporalProjector
from storm_kernels.tokens import positive_int

from .arithmetic import arithmetic
from .config import ModelConfig, Variant
from .configuration_storm import check_frames
from .language import CACHE, build_language
from .parts import check_dtype, seeded
from .pixels import FRAME_BATCH
from .projector import VilaProjector
from .vision import build_vision

PROJECTORS = ("reference", "fused")


class VideoModel(nn.Module):
    """Video in, next token out. Batch 1, as in the paper's measurements. Call it under
    ``torch.inference_mode()`` unless gradients are wanted.

    Args:
        config: sizes, such as ``preset("storm-mini")``.
        variant: projector and token reduction, such as ``variant("storm-tp-ts")``.
        projector: "reference" (plain PyTorch) or "fused" (the same parameters, our kernels); the
            VILA baseline has one form only.
        seed: of the random weights; each part has its own stream, so variants of one seed share
            the weights of what they have in common.
        device, dtype: where and in what the weights are made; better than a later
            ``.to(dtype)``, which would also round the language model's rotary frequencies. A_log, D
            and the bias of dt_proj stay float32 either way.
        blank: leave the weights of the vision tower and the language model unset, for a loader to fill.
    """

    def __init__(
        self,
        config: ModelConfig,
        variant: Variant,
        projector: str = "reference",
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        blank: bool = False,
    ):
        super().__init__()
        self.config, self.variant, self.projector_kind, self.seed = config, variant, _check_projector(projector), seed
        check_dtype(dtype)
        device = torch.device(device)
        with seeded(seed, device, blank=blank):
            self.vision = build_vision(config.vision, dtype)
        with seeded(seed + 1, device, blank=blank):
            self.language = build_language(config.language, dtype)
        self.projector = self._build_projector()
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.language.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language.lm_head.weight.dtype

    def switched(self, variant: Variant, projector: str | None = None) -> VideoModel:
        """The same model with another variant or form of the projector. Weights are shared, not
        copied: vision and language always, the projector's between variants that have the same kind
        of it; otherwise the new projector's come from the seed."""
        other = VideoModel.__new__(VideoModel)
        nn.Module.__init__(other)
        other.config, other.variant, other.seed = self.config, variant, self.seed
        other.projector_kind = self.projector_kind if projector is None else _check_projector(projector)
        other.vision, other.language = self.vision, self.language
        other.projector = other._build_projector()
        if variant.temporal == self.variant.temporal:
            other.projector.load_state_dict(self.projector.state_dict(keep_vars=True), assign=True)
        return other.eval()

    def _build_projector(self) -> nn.Module:
        widths = (self.config.vision.width, self.config.language.width)
        factory = {"device": self.device, "dtype": self.dtype}
        with seeded(self.seed + 2, self.device):
            if not self.variant.temporal:
                return VilaProjector(*widths, **factory)
            cls = storm_kernels.TemporalProjector if self.projector_kind == "fused" else ReferenceTemporalProjector
            return cls(*widths, layers=self.config.projector_layers, bidirectional=self.config.bidirectional, **factory)

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels (T, 3, S, S) -> image tokens (1, T, h, w, Dv); a few frames at a time, so that
        activations do not grow with T.
        """
        size = self.config.vision.image_size
        if pixels.dim() != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixels must have the shape (T, 3, {size}, {size}), got {tuple(pixels.shape)}")
        check_frames(pixels.shape[0])
        with stage("vision"):
            return torch.cat([self.vision(part) for part in pixels.split(FRAME_BATCH)])[None]

    def project(self, features: Tensor) -> Tensor:
        """Image tokens (1, T, h, w, Dv) -> video tokens (1, tokens, D), reduced as the variant says."""
        with stage("projector"):
            return self.projector(features, self.variant.reduction)

    def prefill(self, video_tokens: Tensor, prompt_ids: Tensor):
        """Run the language model over video (1, tokens, D), then prompt (P,) or (1, P) -> (logits
        of the last token (1, vocabulary), cache).

        Logits are made for the last token only: at 32,768 tokens those of all would take 10 GB.
        """
        ids = self._check_prompt(prompt_ids)
        with stage("prefill"):
            prompt = self.language.get_input_embeddings()(ids)
            out = self.language(inputs_embeds=torch.cat([video_tokens, prompt], 1), use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out[CACHE]

    def forward(self, pixels: Tensor, prompt_ids: Tensor) -> Tensor:
        """pixels (T, 3, S, S), prompt (P,) or (1, P) -> logits of the next token (1, vocabulary)."""
        self._check_prompt(prompt_ids)
        return self.prefill(self.project(self.encode(pixels)), prompt_ids)[0]

    @torch.no_grad()
    def generate(self, pixels: Tensor, prompt_ids: Tensor, max_new_tokens: int) -> Tensor:
        """Greedy continuation: (n,) int64 ids, n <= max_new_tokens; stops after one of the language
        model's ``eos_ids``.
        """
        positive_int("max_new_tokens", max_new_tokens)
        self._check_prompt(prompt_ids)
        logits, cache = self.prefill(self.project(self.encode(pixels)), prompt_ids)
        ids = [logits.argmax(-1)]
        while len(ids) < max_new_tokens and ids[-1].item() not in self.config.language.eos_ids:
            logits = self.language(input_ids=ids[-1][None], **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits[
                :, -1
            ]
            ids.append(logits.argmax(-1))
        return torch.cat(ids)

    def arithmetic(self, frames: int, prompt_tokens: int = 0) -> dict[str, int]:
        """FLOPs to the first token by "vision", "projector" and "language" (:func:`model.arithmetic.arithmetic`)."""
        return arithmetic(self.config, self.variant, frames, prompt_tokens)

    def _check_prompt(self, prompt_ids: Tensor) -> Tensor:
        ids = prompt_ids[None] if prompt_ids.dim() == 1 else prompt_ids
        vocabulary = self.config.language.vocabulary
        if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0 or ids.dtype != torch.int64:
            raise ValueError(
                "prompt_ids must be int64 of shape (P,) or (1, P) with P >= 1, "
                f"got {prompt_ids.dtype} of shape {tuple(prompt_ids.shape)}"
            )
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise ValueError(f"prompt_ids must lie in 0..{vocabulary - 1}, got {ids.min().item()}..{ids.max().item()}")
        return ids.to(self.device)


def _check_projector(projector: object) -> str:
    if projector not in PROJECTORS:
        raise ValueError(f"projector must be one of {', '.join(PROJECTORS)}, got {projector!r}")
    return projector
