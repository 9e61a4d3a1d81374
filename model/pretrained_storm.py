"""What both classes of modeling_storm.py have in common: what they tell transformers about themselves,
first weights, strict loading.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging

from storm_kernels.reference import ReferenceMixer
from storm_kernels.reference.mixer import initial_dt_bias

from .configuration_storm import StormConfig
from .loading import check_folder, check_loaded

logger = logging.get_logger(__name__)


class StormPreTrainedModel(PreTrainedModel):
    """What both classes tell transformers about themselves.

    Args:
        config: of the model.
        inputs: transformers' own.
        kwargs: transformers' own.

    Example:
        >>> StormPreTrainedModel.config_class.__name__, StormPreTrainedModel.input_modalities
        ('StormConfig', ('image', 'video', 'text'))
    """

    config: StormConfig
    config_class = StormConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")  # type: ignore[assignment]  # a list there, a tuple nobody changes
    supports_gradient_checkpointing = True
    _no_split_modules = ["MixerLayer", "VilaProjector"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Regular expressions of the mixer's parameters whose rounding would move every later state
    # (docs/spec.md).
    _keep_in_fp32_modules_strict = [
        r"\.mixer\.A_log$",
        r"\.mixer\.A_b_log$",
        r"\.mixer\.D$",
        r"\.mixer\.D_b$",
        r"\.mixer\.dt_proj\.bias$",
        r"\.mixer\.dt_proj_b\.bias$",
    ]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ReferenceMixer):
            _init_mixer(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As every transformers model, but strict.

        A tensor that is missing, left over, of another shape or not finite is an error that names it,
        and pickles are never opened.

        Raises:
            CheckpointError: the weights are not this model's.
        """
        folder = pretrained_model_name_or_path
        given = {
            name: kwargs[name] for name in ("subfolder", "use_safetensors", "config", "state_dict") if name in kwargs
        }
        check_folder(folder, **given)
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        loaded: Any = super().from_pretrained(folder, *args, **kwargs)
        model, info = loaded  # the information was asked for
        check_loaded(folder, info, model)
        for mixer in (module for module in model.modules() if isinstance(module, ReferenceMixer)):
            mixer.mark_parameters()  # transformers put the loaded parameters in the place of those that had the marks
        if getattr(model, "_weight_conversions", None) == []:
            model._weight_conversions = None  # a list, even an empty one, has the tensors sorted into other shards
        if model.config.random_parts:
            logger.warning(random_notice(model.config))
        return (model, info) if wants_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As every transformers model.

        The parts' dtypes are written too, so that a model that is loaded and saved again gives the same bytes.
        """
        for part in (self.config.vision_config, self.config.text_config):
            part.dtype = self.dtype
        super().save_pretrained(*args, **kwargs)


def random_notice(config: StormConfig) -> str:
    """One sentence for whoever is about to believe such a model."""
    parts = ", ".join(config.random_parts or ())
    return f"random weights in {parts}: never trained, so what this model answers means nothing"


def _init_mixer(mixer: ReferenceMixer) -> None:
    """The start of a mixer, as its own constructor makes it; transformers has made it on the meta
    device, without values.
    """
    projections = [mixer.in_proj, mixer.out_proj]
    for suffix in mixer.suffixes:
        conv, dt_proj = getattr(mixer, f"conv1d{suffix}"), getattr(mixer, f"dt_proj{suffix}")
        projections += [conv, getattr(mixer, f"x_proj{suffix}")]
        init.uniform_(dt_proj.weight, -(mixer.dt_rank**-0.5), mixer.dt_rank**-0.5)
        init.copy_(dt_proj.bias, initial_dt_bias(mixer.d_inner, device=dt_proj.bias.device))
        rows = torch.arange(1, mixer.d_state + 1, dtype=torch.float32, device=mixer.D.device)
        init.copy_(mixer.A_b_log if suffix else mixer.A_log, rows.log().expand(mixer.d_inner, -1))
        init.ones_(getattr(mixer, f"D{suffix}"))
    for projection in projections:
        init.kaiming_uniform_(projection.weight, a=math.sqrt(5))
        if projection.bias is not None:
            bound = 1 / math.sqrt(projection.weight[0].numel())
            init.uniform_(projection.bias, -bound, bound)
