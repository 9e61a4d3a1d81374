"""STORM (arXiv 2503.04130) and its VILA baseline (arXiv 2412.04468) as transformers models: vision
tower, projector, language model.

A video is encoded a few frames at a time. All videos of a call go through the projector together,
one after the other (`packed`), each reduced as if it were alone. Its tokens then take the place of
the prompt's placeholders.

The file is long by what its two ``forward`` take and say: transformers' models spell both out.
"""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from storm_kernels.profiling import stage
from storm_kernels.tokens import TokenReduction, described

from .configuration_storm import StormConfig, checked_reduction
from .context import check_context
from .pixels import FRAME_BATCH
from .pretrained_storm import StormPreTrainedModel
from .projector import build_projector

# What this transformers calls a language model's cache: 5.24 renamed it, and 5.40 drops the older
# name.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class StormModel(StormPreTrainedModel):
    """Vision tower, projector and language model without its head.

    Args:
        config: what it is made of; the weights are random.

    Source:
        STORM, arXiv 2503.04130 (docs/spec.md, "The models to compare").

    Example:
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> vision = {**sizes, "image_size": 28, "patch_size": 14}
        >>> text = {**sizes, "num_key_value_heads": 1, "vocab_size": 16}
        >>> model = StormModel(StormConfig(vision_config=vision, text_config=text, projector_layers=1))
        >>> features = model.get_video_features(torch.zeros(1, 4, 3, 28, 28))  # 4 frames of one token
        >>> features.pooler_output[0].shape  # of the first video
        torch.Size([4, 8])
    """

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: StormConfig) -> None:
        super().__init__(config)
        tower = AutoModel.from_config(config.vision_config)
        self.vision_tower = getattr(tower, "vision_model", tower)  # some releases nest the tower once more
        # The projector reads the last layer's output as it is. A norm that is not used would have
        # no gradient.
        self.vision_tower.post_layernorm = nn.Identity()
        self.projector = build_projector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's embedding of tokens."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put ``value`` in the place of the language model's embedding of tokens."""
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: Tensor | list[Tensor],
        video_reductions: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """The tokens of each video, in ``pooler_output``: a list of (tokens, D), one a video.

        Args:
            pixel_values_videos: (n, T, 3, S, S), (T, 3, S, S) for one video, or a list of n tensors (T, 3, S, S).
            video_reductions: (n, 3): temporal_pool, spatial_pool, temporal_stride of each; by default the config's.
            kwargs: transformers' own (``return_dict``).

        Raises:
            TypeError: pixels that are no tensors, named.
            ValueError: pixels of another shape, or as many reductions as there are not videos; named.
        """
        videos = self._checked("pixel_values_videos", pixel_values_videos)
        reductions = self._reductions("video_reductions", video_reductions, len(videos))
        features = self.encode(videos[0] if len(videos) == 1 else torch.cat(videos))
        tokens: Any = self.project(features, [len(v) for v in videos], reductions)  # a list, as of other video models
        return BaseModelOutputWithPooling(pooler_output=tokens)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, image_reductions: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """As :meth:`get_video_features`, for images (n, 3, S, S): each is a video of one frame."""
        images = self._checked("pixel_values", pixel_values.unsqueeze(1))
        reductions = self._reductions("image_reductions", image_reductions, len(images))
        tokens: Any = self.project(self.encode(pixel_values), [1] * len(images), reductions)
        return BaseModelOutputWithPooling(pooler_output=tokens)

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels (T, 3, S, S) -> image tokens (T, h, w, Dv), a few frames at a time so that activations do not grow."""
        with stage("vision"):
            pixels = pixels.to(self.vision_tower.dtype)
            parts = [self.vision_tower(pixel_values=part).last_hidden_state for part in pixels.split(FRAME_BATCH)]
            tokens = parts[0] if len(parts) == 1 else torch.cat(parts)
            side = math.isqrt(tokens.shape[1])
            return tokens.unflatten(1, (side, side))

    def project(self, features: Tensor, frames: list[int], reductions: list[TokenReduction]) -> list[Tensor]:
        """Image tokens ``features`` of all videos (sum of ``frames``, h, w, Dv) -> (tokens, D) of each.

        Those with one and the same of the ``reductions`` go through the projector in one packed call.
        """
        parts = features.split(frames)
        videos: list[Tensor] = list(parts)  # each is replaced by its tokens
        for reduction in dict.fromkeys(reductions):
            places = [i for i, own in enumerate(reductions) if own == reduction]
            packed = features if len(places) == len(frames) else torch.cat([parts[i] for i in places])
            lengths = [frames[i] for i in places]
            with stage("projector"):
                tokens = self._project(packed[None], reduction, lengths)
            sizes = [reduction.reduced(self.config.token_grid(n)).tokens for n in lengths]
            for place, video in zip(places, tokens[0].split(sizes), strict=True):
                videos[place] = video
        return videos

    def _project(self, features: Tensor, reduction: TokenReduction, lengths: list[int]) -> Tensor:
        packed = lengths if len(lengths) > 1 else None
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(self.projector.__call__, features, reduction, packed=packed)
        return self.projector(features, reduction, packed=packed)

    def get_placeholder_mask(self, input_ids: Tensor, modality: str, features: list[Tensor]) -> Tensor:
        """(batch, length) bool: where the features of "image" or "video" go; raise unless there are as many places."""
        mask = input_ids == getattr(self.config, f"{modality}_token_id")
        places, tokens = int(mask.sum()), sum(len(own) for own in features)
        if places != tokens:
            raise ValueError(
                f"input_ids have {places} placeholders of {modality}s, but the {len(features)} {modality}s given "
                f"have {tokens} "
                "tokens; the processor has to count with the same reduction, and a placeholder needs its video"
            )
        return mask

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | list[Tensor] | None = None,
        image_reductions: Tensor | None = None,
        video_reductions: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The language model over the prompt, whose placeholders the videos' tokens replace.

        Args:
            input_ids: (batch, length), the prompt; None where ``inputs_embeds`` are given.
            pixel_values: (n, 3, S, S), the images; None for none.
            pixel_values_videos: as :meth:`get_video_features` takes them; None for none.
            image_reductions: (n, 3), as the videos'.
            video_reductions: (n, 3): temporal_pool, spatial_pool, temporal_stride of each; None for the config's.
            attention_mask: (batch, length), or masks by kind of layer, as the language model takes it.
            position_ids: (batch, length), as the language model takes them.
            inputs_embeds: (batch, length, D) in place of ``input_ids``; then without pixels.
            mm_encoder_outputs: {"video": ..., "image": ...} of :meth:`get_video_features`, instead of pixels: what was
                encoded once serves further questions.
            kwargs: the language model's own (its cache, use_cache, output_hidden_states, ...).

        Raises:
            ValueError: placeholders without videos or the reverse, or a prompt longer than the context.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        pixels = {"image": (pixel_values, image_reductions), "video": (pixel_values_videos, video_reductions)}
        prompt = input_ids if inputs_embeds is None else inputs_embeds
        assert prompt is not None, "one of the two is there"
        if inputs_embeds is None:
            if any(given is not None for given, _ in pixels.values()):
                check_context(self.config, prompt, pixel_values_videos, video_reductions)
            features = self._features(prompt, pixels, mm_encoder_outputs or {})
        elif mm_encoder_outputs or any(given is not None for given, _ in pixels.values()):
            raise ValueError("pixels and their features need input_ids, which say where they go, not inputs_embeds")
        with reading(prompt):
            if inputs_embeds is None:
                inputs_embeds = self._filled(prompt, features)
            return self.language_model(
                inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, **kwargs
            )

    def _features(
        self, input_ids: Tensor, pixels: dict[str, tuple[Any, Any]], known: dict[str, BaseModelOutputWithPooling]
    ) -> dict[str, list[Tensor]]:
        """The tokens of images and videos by modality, (tokens, D) of each, made of pixels or known already."""
        found: dict[str, list[Tensor]] = {}
        for modality, (given, reductions) in pixels.items():
            if given is not None and known.get(modality) is not None:
                raise ValueError(f"give the {modality}s' pixels or their features, not both")
            if given is not None:
                get = self.get_video_features if modality == "video" else self.get_image_features
                found[modality] = list(get(given, reductions, return_dict=True).pooler_output)
            elif known.get(modality) is not None:
                stored: Any = known[modality].pooler_output
                found[modality] = [own.flatten(0, -2) for own in stored]
            elif input_ids.shape[1] > 1:  # a token that was just written has nothing to fill
                found[modality] = []
        return found

    def _filled(self, input_ids: Tensor, found: dict[str, list[Tensor]]) -> Tensor:
        """The embeddings of the prompt, with the tokens of images and videos in their places."""
        embeds = self.get_input_embeddings()(input_ids)
        for modality, features in found.items():
            mask = self.get_placeholder_mask(input_ids, modality, features)
            if features:
                tokens = torch.cat([own.to(embeds.device, embeds.dtype) for own in features])
                embeds = embeds.masked_scatter(mask.unsqueeze(-1).to(embeds.device), tokens)
        return embeds

    def _checked(self, name: str, given: Any) -> list[Tensor]:
        videos = [given] if isinstance(given, Tensor) and given.dim() == 4 else list(given)
        size = self.config.vision_config.image_size
        for video in videos:
            if (
                not isinstance(video, Tensor)
                or video.dim() != 4
                or video.shape[1:] != (3, size, size)
                or not len(video)
            ):
                raise ValueError(f"{name} must be videos of shape (T, 3, {size}, {size}), got {described(video)}")
        return videos

    def _reductions(self, name: str, given: Tensor | None, n: int) -> list[TokenReduction]:
        if given is None:
            return [self.config.reduction] * n
        if tuple(given.shape) != (n, 3):
            raise ValueError(f"{name} must have the shape ({n}, 3), got {tuple(given.shape)}")
        return [checked_reduction(*sizes) for sizes in given.tolist()]


class StormForConditionalGeneration(StormPreTrainedModel, GenerationMixin):
    """STORM or VILA with the language model's head: videos and a question in, an answer out.

    Args:
        config: what it is made of; the weights are random. ``from_pretrained(folder)`` takes them from a folder.

    Source:
        STORM, arXiv 2503.04130; VILA, arXiv 2412.04468 (docs/spec.md, "The models to compare").

    Example:
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> vision = {**sizes, "image_size": 28, "patch_size": 14}
        >>> text = {**sizes, "num_key_value_heads": 1, "vocab_size": 16, "eos_token_id": None}
        >>> config = StormConfig(vision_config=vision, text_config=text, projector_layers=1, video_token_id=15)
        >>> model = StormForConditionalGeneration(config).eval()
        >>> prompt = torch.tensor([[15, 15, 3, 4]])  # 2 frames of one token, then the question
        >>> video = torch.zeros(1, 2, 3, 28, 28)
        >>> model.generate(input_ids=prompt, pixel_values_videos=video, max_new_tokens=5, pad_token_id=2).shape
        torch.Size([1, 9])
    """

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: StormConfig) -> None:
        super().__init__(config)
        self.model = StormModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's embedding of tokens."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put ``value`` in the place of the language model's embedding of tokens."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Put ``value`` in the place of the head."""
        self.lm_head = value

    def get_video_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See :meth:`StormModel.get_video_features`."""
        return self.model.get_video_features(*args, **kwargs)

    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See :meth:`StormModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | list[Tensor] | None = None,
        image_reductions: Tensor | None = None,
        video_reductions: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """The logits; for the other arguments see :meth:`StormModel.forward`.

        Args:
            input_ids: as there.
            pixel_values: as there.
            pixel_values_videos: as there.
            image_reductions: as there.
            video_reductions: as there.
            attention_mask: as there.
            position_ids: as there.
            inputs_embeds: as there.
            labels: (batch, length): what to predict, -100 where nothing is; gives ``loss``.
            logits_to_keep: the last so many positions' logits are made (0: all), or those of these indices.
            mm_encoder_outputs: as there.
            kwargs: as there.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_reductions=image_reductions,
            video_reductions=video_reductions,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        with reading(hidden):
            logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
            self._note_training()
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{name: outputs.get(name) for name in ("hidden_states", "attentions", CACHE)},
        )

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As every transformers model; a prompt longer than the context is an error before anything is encoded."""
        input_ids = kwargs.get("input_ids", inputs)
        if input_ids is not None:
            check_context(self.config, input_ids, kwargs.get("pixel_values_videos"), kwargs.get("video_reductions"))
        return super().generate(inputs, *args, **kwargs)

    def _expand_multimodal_outputs(self, input_ids: Any, mm_encoder_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Beams repeat a video's features in place: in a copy, so that the caller's serve the next question too."""
        copied = {modality: copy.copy(output) for modality, output in mm_encoder_output.items()}
        expand: Any = super()._expand_multimodal_outputs  # type: ignore[misc]  # the mixin asks for a class of stubs
        return expand(input_ids, copied, *args, **kwargs)

    def _note_training(self) -> None:
        """Parts whose weights a training step is about to change are random no longer."""
        if self.training and torch.is_grad_enabled() and self.config.random_parts:
            frozen = [part for part in self.config.random_parts if not _trains(self.model.get_submodule(part))]
            self.config.random_parts = frozen or None


def reading(prompt: Tensor) -> AbstractContextManager[object]:
    """The stage of a call on ``prompt`` (batch, length, ...): the first reads it, those after it write a token each."""
    return stage("prefill" if prompt.shape[1] > 1 else "token")


def _trains(module: nn.Module) -> bool:
    return all(parameter.requires_grad for parameter in module.parameters())
