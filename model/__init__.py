"""The complete STORM (arXiv 2503.04130) and its VILA baseline as transformers models.

A video and a question in, an answer out. Importing this package registers them with transformers'
Auto classes. Needs the extra ``model``.

Example:
    >>> import storm_model
    >>> from transformers import AutoConfig
    >>> AutoConfig.for_model("storm").projector_type
    'storm'
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

from .configuration_storm import StormConfig
from .loading import CheckpointError
from .modeling_storm import StormForConditionalGeneration, StormModel
from .pretrained_storm import StormPreTrainedModel
from .processing_storm import StormProcessor
from .video_processing_storm import StormImageProcessor, StormVideoProcessor

__all__ = [
    "CheckpointError",
    "StormConfig",
    "StormForConditionalGeneration",
    "StormImageProcessor",
    "StormModel",
    "StormPreTrainedModel",
    "StormProcessor",
    "StormVideoProcessor",
]

AutoConfig.register(StormConfig.model_type, StormConfig)
AutoModel.register(StormConfig, StormModel)
AutoModelForImageTextToText.register(StormConfig, StormForConditionalGeneration)
AutoModelForMultimodalLM.register(StormConfig, StormForConditionalGeneration)
AutoImageProcessor.register(
    StormConfig, image_processor_classes=dict.fromkeys(("pil", "torchvision"), StormImageProcessor)
)
AutoVideoProcessor.register(StormConfig, StormVideoProcessor)
AutoProcessor.register(StormConfig, StormProcessor)
