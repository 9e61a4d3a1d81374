"""mamba_ssm's language model of Mamba-1 blocks, with its parameter names:
``backbone.layers.N.mixer.*`` and so on, ``lm_head.weight`` tied.

Checkpoints of the original load, its blocks serve other models, and generation is greedy
(:mod:`storm_kernels.interop.inference`).
"""

from __future__ import annotations

import json
import math
from collections import namedtuple
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .inference import GenerationMixin, load_config_hf, load_state_dict_hf
from .mixer import Mamba
from .norms import RMSNorm, layer_norm_fn


@dataclass
class MambaConfig:
    """The entries of the original's config.json."""

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict = field(default_factory=dict)
    attn_layer_idx: list = field(default_factory=list)
    attn_cfg: dict = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


class GatedMLP(nn.Module):
    """``fc2(first half of fc1(x) * activation(second half))``; the hidden width is rounded up to ``multiple_of``."""

    def __init__(
        self, in_features, hidden_features=None, out_features=None, activation=F.silu, bias=False,
        multiple_of=128, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        wanted = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = math.ceil(wanted / multiple_of) * multiple_of
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.activation = activation
        self.fc2 = nn.Linear(
            hidden, in_features if out_features is None else out_features, bias=bias, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(value * self.activation(gate))


class Block(nn.Module):
    """Add, norm, mix, and where there is an MLP once more (``mamba_ssm.modules.block``).

    Args:
        dim: width.
        mixer_cls, mlp_cls, norm_cls: called with ``dim``; ``mlp_cls=nn.Identity`` leaves the MLP out.
        fused_add_norm: add and norm in one call, with sums in float32; wants RMSNorm or LayerNorm.
        residual_in_fp32: keep the residual in float32.
    """

    def __init__(self, dim, mixer_cls, mlp_cls, norm_cls=nn.LayerNorm, fused_add_norm=False, residual_in_fp32=False):
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm, self.mixer, self.mlp = norm_cls(dim), mixer_cls(dim), None
        if mlp_cls is not nn.Identity:
            self.norm2, self.mlp = norm_cls(dim), mlp_cls(dim)
        if fused_add_norm and not isinstance(self.norm, nn.LayerNorm | RMSNorm):
            raise TypeError(
                "fused_add_norm wants norm_cls to make a LayerNorm or mamba_ssm's RMSNorm, "
                f"got {type(self.norm).__name__}"
            )

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params=None, **mixer_kwargs
    ) -> tuple[Tensor, Tensor]:
        """hidden_states, residual (b, l, dim) -> both, the residual not yet added."""
        hidden_states, residual = self._add_and_norm(hidden_states, residual, self.norm)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if getattr(self, "mlp", None) is not None:  # a block of mamba_ssm 1.x has no such attribute
            hidden_states, residual = self._add_and_norm(hidden_states, residual, self.norm2)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def _add_and_norm(self, hidden_states: Tensor, residual: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
        if self.fused_add_norm:
            return _fused(hidden_states, residual, norm, True, self.residual_in_fp32)
        residual = hidden_states if residual is None else hidden_states + residual
        normed = norm(residual.to(norm.weight.dtype))
        return normed, residual.float() if self.residual_in_fp32 else residual

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """The mixer's states."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)


class MixerBlock(Block):
    """``Block`` of mamba_ssm 1.x (``mamba_ssm.modules.mamba_simple``): no MLP, so ``norm_cls`` comes third."""

    def __init__(self, dim, mixer_cls, norm_cls=nn.LayerNorm, fused_add_norm=False, residual_in_fp32=False):
        super().__init__(dim, mixer_cls, nn.Identity, norm_cls, fused_add_norm, residual_in_fp32)


def _fused(x: Tensor, residual: Tensor | None, norm: nn.Module, prenorm: bool, residual_in_fp32: bool):
    return layer_norm_fn(
        x, norm.weight, norm.bias, residual, eps=norm.eps, prenorm=prenorm, residual_in_fp32=residual_in_fp32,
        is_rms_norm=isinstance(norm, RMSNorm)
    )  # fmt: skip


def create_block(
    d_model, d_intermediate=0, ssm_cfg=None, attn_layer_idx=None, attn_cfg=None, norm_epsilon=1e-5,
    rms_norm=False, residual_in_fp32=False, fused_add_norm=False, layer_idx=None, device=None, dtype=None,
) -> Block:  # fmt: skip
    """The block number ``layer_idx`` of the model that these entries of :class:`MambaConfig` describe."""
    factory = {"device": device, "dtype": dtype}
    if layer_idx in (attn_layer_idx or ()):
        raise NotImplementedError(
            f"attn_layer_idx={attn_layer_idx!r}: attention layers (MHA) are not supported, only Mamba-1 layers are"
        )
    options = dict(ssm_cfg or {})
    layer = options.pop("layer", "Mamba1")
    if layer != "Mamba1":
        raise NotImplementedError(
            f"ssm_cfg['layer'] is {layer!r}: only 'Mamba1' is supported; transformers has Mamba-2"
        )
    mlp = (
        nn.Identity
        if d_intermediate == 0
        else partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **factory)
    )
    norm = partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **factory)
    block = Block(
        d_model, partial(Mamba, layer_idx=layer_idx, **options, **factory), mlp, norm, fused_add_norm, residual_in_fp32
    )
    block.layer_idx = layer_idx
    return block


def _initialise(
    module: nn.Module, n_layer: int, initializer_range=0.02, rescale_prenorm_residual=True, n_residuals_per_layer=1
) -> None:
    """Embeddings normal, biases zero, and what is added to the residual scaled down by the number
    of such additions (GPT-2).
    """
    if isinstance(module, nn.Linear) and module.bias is not None and not getattr(module.bias, "_no_reinit", False):
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual and isinstance(module, Block):
        for name, weight in module.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
                with torch.no_grad():
                    weight /= math.sqrt(n_residuals_per_layer * n_layer)


class MixerModel(nn.Module):
    """Embedding, blocks and a last norm; arguments as in :class:`MambaConfig`. ``initializer_cfg``
    goes to the initialisation.
    """

    def __init__(
        self, d_model, n_layer, d_intermediate, vocab_size, ssm_cfg=None, attn_layer_idx=None, attn_cfg=None,
        norm_epsilon=1e-5, rms_norm=False, initializer_cfg=None, fused_add_norm=False, residual_in_fp32=False,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **factory)
        block: Callable[..., Block] = partial(
            create_block, d_model, d_intermediate, ssm_cfg, attn_layer_idx, attn_cfg, norm_epsilon, rms_norm,
            residual_in_fp32, fused_add_norm
        )  # fmt: skip
        self.layers = nn.ModuleList(block(layer_idx=i, **factory) for i in range(n_layer))
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **factory)
        residuals = 1 if d_intermediate == 0 else 2
        self.apply(partial(_initialise, n_layer=n_layer, n_residuals_per_layer=residuals, **(initializer_cfg or {})))

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """The states of every layer, by its number."""
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for i, layer in enumerate(self.layers)
        }

    def forward(self, input_ids: Tensor, inference_params=None, **mixer_kwargs) -> Tensor:
        """input_ids (b, l) -> (b, l, d_model)."""
        hidden, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, inference_params=inference_params, **mixer_kwargs)
        if self.fused_add_norm:
            return _fused(hidden, residual, self.norm_f, False, self.residual_in_fp32)
        summed = hidden if residual is None else hidden + residual
        return self.norm_f(summed.to(self.norm_f.weight.dtype))


CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """``mamba_ssm.MambaLMHeadModel``.

    Example::

        model = MambaLMHeadModel.from_pretrained("folder with config.json and the weights")
        tokens = model.generate(input_ids, max_length=100)
    """

    def __init__(self, config: MambaConfig, initializer_cfg=None, device=None, dtype=None):
        super().__init__()
        self.config = config
        multiple = config.pad_vocab_size_multiple
        vocab_size = math.ceil(config.vocab_size / multiple) * multiple
        self.backbone = MixerModel(
            config.d_model, config.n_layer, config.d_intermediate, vocab_size, config.ssm_cfg, config.attn_layer_idx,
            config.attn_cfg,
            rms_norm=config.rms_norm, initializer_cfg=initializer_cfg, fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32, device=device, dtype=dtype,
        )  # fmt: skip
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, device=device, dtype=dtype)
        self.tie_weights()

    def tie_weights(self) -> None:
        """One weight for the embedding and for the head, if the configuration wants so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """The states of every layer, by its number."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self, input_ids: Tensor, position_ids=None, inference_params=None, num_last_tokens: int = 0, **mixer_kwargs
    ) -> CausalLMOutput:
        """input_ids (b, l) -> ``.logits`` (b, l, vocabulary), of the last ``num_last_tokens`` if
        above 0. ``position_ids`` changes nothing.
        """
        hidden = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        return CausalLMOutput(self.lm_head(hidden[:, -num_last_tokens:] if num_last_tokens > 0 else hidden))

    @classmethod
    def from_pretrained(cls, pretrained_model_name, device=None, dtype=None, **kwargs) -> MambaLMHeadModel:
        """The model of a local folder, or of the hub through transformers: config.json and model.safetensors."""
        entries = load_config_hf(pretrained_model_name)
        unknown = [name for name in entries if name not in MambaConfig.__dataclass_fields__]
        if unknown:
            raise ValueError(
                f"{pretrained_model_name}: config.json is not mamba_ssm's, "
                f"which has no {', '.join(map(repr, unknown[:3]))}; if it is transformers', "
                "load it with transformers.AutoModelForCausalLM"
            )
        model = cls(MambaConfig(**entries), device=device, dtype=dtype, **kwargs)
        weights = load_state_dict_hf(pretrained_model_name, device=device, dtype=dtype)
        if model.config.tie_embeddings and "lm_head.weight" not in weights:
            weights["lm_head.weight"] = weights["backbone.embedding.weight"]
        model.load_state_dict(weights)
        return model

    def save_pretrained(self, save_directory) -> None:
        """config.json and model.safetensors, without ``lm_head.weight`` where it is the embedding's."""
        from safetensors.torch import save_file

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        tied = self.config.tie_embeddings
        weights = {
            name: w.contiguous() for name, w in self.state_dict().items() if not (tied and name == "lm_head.weight")
        }
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=4))
