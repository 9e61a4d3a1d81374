"""Questions and videos to a model's inputs: chat template, placeholders counted as the model will reduce the tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.video_processing_utils import VideoProcessorMixin

from storm_kernels.tokens import TokenGrid, TokenReduction, described

from .configuration_storm import checked_reduction, token_grid
from .video_processing_storm import (
    REDUCTION,
    StormImageProcessor,
    StormVideoProcessor,
    flat_videos,
    is_list_of_videos,
)

IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"
_TEMPLATES = Path(__file__).parent / "templates"


class StormProcessor(ProcessorMixin):
    """Text, images and videos to ``input_ids``, ``attention_mask`` and pixels; every placeholder stands for one token.

    Args:
        image_processor: of the same sizes and reduction as the videos'.
        tokenizer: of the language model; it has to have ``<image>`` and ``<video>`` as one token each.
        video_processor: reads and scales the videos.
        chat_template: Jinja, see :func:`chat_template`; None for none.
        frame_separator: text after each frame's tokens that are left, such as VILA's line break; by default none, as
            STORM has it.

    Raises:
        ValueError: the tokenizer does not have the placeholders.

    Example:
        >>> import numpy
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"<image>": 0, "<video>": 1, "why": 2, "-": 3}, unk_token="-"))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="-", pad_token="-")
        >>> _ = tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
        >>> sizes = {"image_size": 28, "patch_size": 14, "temporal_pool": 2}
        >>> processor = StormProcessor(StormImageProcessor(**sizes), tokenizer, StormVideoProcessor(**sizes))
        >>> video = numpy.zeros((4, 32, 32, 3), numpy.uint8)  # 4 frames of one token, of which two are left
        >>> processor(text="<video>why", videos=[video], return_tensors="pt")["input_ids"]
        tensor([[1, 1, 2]])
    """

    # Videos of different lengths stay a list of tensors.
    skip_tensor_conversion = [*ProcessorMixin.skip_tensor_conversion, "pixel_values_videos"]
    text_kwargs = {"padding": True, "padding_side": "left"}

    def __init__(
        self,
        image_processor: StormImageProcessor | None = None,
        tokenizer: Any = None,
        video_processor: StormVideoProcessor | None = None,
        chat_template: str | None = None,
        frame_separator: str = "",
    ) -> None:
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template)
        self.image_token, self.video_token, self.frame_separator = IMAGE_TOKEN, VIDEO_TOKEN, frame_separator
        self.image_token_id, self.video_token_id = (_token_id(tokenizer, t) for t in (IMAGE_TOKEN, VIDEO_TOKEN))

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: Any = None, **kwargs: Any
    ) -> list[Any]:
        """The three parts, each by its own class: transformers' AutoVideoProcessor asks for torchvision."""
        folder = pretrained_model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
        parts = (
            StormImageProcessor.from_pretrained(folder, **kwargs),
            StormVideoProcessor.from_pretrained(folder, **kwargs),
        )
        return [parts[0], tokenizer, parts[1]]

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        """As the base class, which finds the class of video processors only where torchvision is installed."""
        if argument_name != "video_processor":
            return super().check_argument_for_proper_class(argument_name, argument)
        if not isinstance(argument, VideoProcessorMixin):
            raise TypeError(f"video_processor must be a video processor, got {described(argument)}")
        return VideoProcessorMixin

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> BatchFeature:
        """One text or a list of them, with as many images and videos as they have placeholders, in their order.

        Args:
            images: see :class:`StormImageProcessor`; lists of lists are taken one after the other. None for none.
            text: a text or a list of them; None for images or videos alone.
            videos: see :class:`StormVideoProcessor`; lists of lists are taken one after the other. None for none.
            kwargs: transformers' own (``return_tensors``, ``padding``, ...) and those of :class:`StormVideosKwargs`.

        Raises:
            StormVideoError: a video that cannot be read.
            TypeError: an argument of the wrong type, named.
            ValueError: an argument out of range, named; placeholders that do not fit the videos.
        """
        self._check_counts(text, images, videos)
        nested = kwargs.get("text_kwargs", {})  # transformers 5.19 has no defaults by class
        kwargs |= {name: value for name, value in self.text_kwargs.items() if name not in {*kwargs, *nested}}
        return super().__call__(images=images, text=text, videos=videos, **kwargs)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The placeholders of one image."""
        return self._placeholders(
            self.image_token, 1, image_inputs["image_reductions"][image_idx].tolist(), self.image_processor
        )

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int, **kwargs: Any) -> str:
        """The placeholders of one video, with ``frame_separator`` after each frame that is left."""
        frames = len(video_inputs["pixel_values_videos"][video_idx])
        return self._placeholders(
            self.video_token, frames, video_inputs["video_reductions"][video_idx].tolist(), self.video_processor
        )

    def _get_num_multimodal_tokens(
        self, image_sizes: Any = None, video_sizes: Any = None, **kwargs: Any
    ) -> MultiModalData:
        """How many tokens images (height, width) and videos (frames, height, width) of these sizes
        become; for engines.
        """
        counted: dict[str, list[int]] = {}
        if image_sizes is not None:
            one = self._reduced(1, self._chosen(self.image_processor, kwargs), self.image_processor).tokens
            counted |= {"num_image_tokens": [one] * len(image_sizes), "num_image_patches": [1] * len(image_sizes)}
        if video_sizes is not None:
            chosen = self._chosen(self.video_processor, kwargs)
            counted["num_video_tokens"] = [
                self._reduced(size[0], chosen, self.video_processor).tokens for size in video_sizes
            ]
        return MultiModalData(**counted)

    @staticmethod
    def _chosen(part: Any, options: dict[str, Any]) -> list[int]:
        return [getattr(part, name) if options.get(name) is None else options[name] for name in REDUCTION]

    @staticmethod
    def _reduced(frames: int, reduction: list[int], part: Any) -> TokenGrid:
        chosen: TokenReduction = checked_reduction(*reduction)
        return chosen.reduced(token_grid(frames, part.image_size, part.patch_size))

    def _placeholders(self, token: str, frames: int, reduction: list[int], part: Any) -> str:
        left = self._reduced(frames, reduction, part)
        return (token * left.tokens_per_frame + self.frame_separator) * left.frames

    def _check_counts(self, text: Any, images: Any, videos: Any) -> None:
        """One sentence before anything is decoded."""
        texts = [text] if isinstance(text, str) else list(text or [])
        for name, token, given in (("images", self.image_token, images), ("videos", self.video_token, videos)):
            wanted = sum(sample.count(token) for sample in texts if isinstance(sample, str))
            if given is None and wanted:
                raise ValueError(f"the text has {wanted} {token}, but no {name} were given")
            if given is not None and text is not None and not wanted:
                raise ValueError(f"{name} were given, but the text has no {token}")
        wanted = sum(sample.count(self.video_token) for sample in texts if isinstance(sample, str))
        if videos is not None and text is not None and (given := len(list(flat_videos(videos)))) != wanted:
            raise ValueError(f"the text has {wanted} {self.video_token}, but {given} videos were given")
        self._check_own_videos(texts, videos)

    def _check_own_videos(self, texts: list[Any], videos: Any) -> None:
        """Where each text of a batch has its own list of videos, its placeholders are theirs, not its neighbour's."""
        if (
            not isinstance(videos, (list, tuple))
            or len(videos) != len(texts)
            or not all(map(is_list_of_videos, videos))
        ):
            return
        for i, (text, own) in enumerate(zip(texts, videos, strict=True)):
            given = len(list(flat_videos(own)))
            if isinstance(text, str) and text.count(self.video_token) != given:
                raise ValueError(
                    f"text {i} has {text.count(self.video_token)} {self.video_token}, "
                    f"but {given} videos were given for it"
                )


def chat_template(tokenizer: Any, after_media: str = "\n") -> str:
    """The template of a processor: contents of several parts are brought to one text each, with the
    placeholders; the language model's own template does the rest, or a plain one where it has none.

    Args:
        tokenizer: of the language model, whose own template is taken.
        after_media: text between an image or a video and what follows it.

    Example:
        >>> # processor.chat_template = chat_template(processor.tokenizer)
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own["default"]
    flatten = (_TEMPLATES / "flatten.jinja").read_text(encoding="utf-8")
    flatten = f"{{%- set after_media = {json.dumps(after_media)} -%}}\n{flatten}"
    return flatten + (own or (_TEMPLATES / "plain.jinja").read_text(encoding="utf-8"))


def _token_id(tokenizer: Any, token: str) -> int:
    number = tokenizer.convert_tokens_to_ids(token)
    if number is None or number == tokenizer.unk_token_id or tokenizer.tokenize(token) != [token]:
        raise ValueError(
            f"the tokenizer ({type(tokenizer).__name__}, {len(tokenizer)} tokens) has no token {token}: add it with "
            f"tokenizer.add_special_tokens({{'additional_special_tokens': [{token!r}]}})"
        )
    return number
