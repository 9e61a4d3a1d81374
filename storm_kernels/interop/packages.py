"""Which modules and names :func:`storm_kernels.interop.install` offers, and what stands behind each.

The module paths are those that mamba_ssm's users import: Vim, VideoMamba, BIMBA, VMamba, U-Mamba,
transformers. What storm_kernels does not have (Mamba-2, Mamba-3, attention) can be imported where
mamba_ssm has it, for many files import it and never use it, and raises at the call.
"""

from __future__ import annotations

import importlib

from torch import nn

from . import causal_conv1d, compiled, inference, language_model, mamba_ssm, norms, vim


class Absent:
    """Mixed into what raises at the call: transformers must not find it, for it has a fallback of its own."""


def _absent_class(name: str, advice: str) -> type:
    def __init__(self, *args, **kwargs):
        raise NotImplementedError(f"{name} is not supported by storm_kernels: {advice}")

    return type(name, (Absent, nn.Module), {"__init__": __init__, "__doc__": f"Raises: {advice}."})


class _AbsentFunction(Absent):
    def __init__(self, name: str, advice: str):
        self.__name__, self.advice = name, advice

    def __call__(self, *args, **kwargs):
        raise NotImplementedError(f"{self.__name__} is not supported by storm_kernels: {self.advice}")


def _einops(name: str):
    """einops' function of that name, for files that take it from here; without einops it raises at the call."""
    try:
        return getattr(importlib.import_module("einops"), name)
    except ImportError:
        return _AbsentFunction(name, "it is einops', which is not installed: pip install einops")


_MAMBA_2 = (
    "it belongs to Mamba-2, which transformers has in plain PyTorch (Mamba2ForCausalLM); this library has Mamba-1"
)
_MAMBA_3 = "it is another model; this library has Mamba-1"
_MAMBA_2_CLASSES = {name: _absent_class(name, _MAMBA_2) for name in ("Mamba2", "Mamba2Simple")}
_MAMBA_3_CLASS = {"Mamba3": _absent_class("Mamba3", _MAMBA_3)}
_MHA = {"MHA": _absent_class("MHA", "use torch.nn.MultiheadAttention, or mamba_ssm's own")}
_SSD = (
    "mamba_chunk_scan_combined",
    "mamba_conv1d_scan_ref",
    "mamba_split_conv1d_scan_combined",
    "mamba_split_conv1d_scan_ref",
    "ssd_selective_scan",
)


def _names(module, *names: str) -> dict[str, object]:
    return {name: getattr(module, name) for name in names}


_SCAN = {
    **_names(mamba_ssm, "selective_scan_fn", "selective_scan_ref", "mamba_inner_fn", "mamba_inner_ref"),
    **_names(vim, "bimamba_inner_fn", "bimamba_inner_ref", "mamba_inner_fn_no_out_proj"),
}
_NORMS = _names(norms, "RMSNorm", "layer_norm_fn", "layer_norm_ref", "rms_norm_fn", "rms_norm_ref")
_CONV = _names(causal_conv1d, "causal_conv1d_fn", "causal_conv1d_update")
_CONV_REFS = _names(causal_conv1d, "causal_conv1d_ref", "causal_conv1d_update_ref")
_UPDATE = _names(mamba_ssm, "selective_state_update", "selective_state_update_ref")
_MODEL = _names(language_model, "MambaConfig", "MixerModel", "MambaLMHeadModel", "create_block")

# The version is that of the interface: below 2.0.4, at which transformers takes Mamba-2 to be
# there.
PACKAGES: dict[str, dict[str, dict[str, object]]] = {
    "mamba_ssm": {
        "mamba_ssm": {
            "__version__": "1.2.2+storm.kernels",
            "Mamba": mamba_ssm.Mamba,
            "MambaLMHeadModel": language_model.MambaLMHeadModel,
            "Mamba2": _MAMBA_2_CLASSES["Mamba2"],
            **_MAMBA_3_CLASS,
            **_UPDATE,
            **_SCAN,
        },
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.selective_scan_interface": {
            **_SCAN,
            **_CONV,
            **_names(compiled, "selective_scan_cuda"),
            "rearrange": _einops("rearrange"),
            "repeat": _einops("repeat"),
        },
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.layernorm": _NORMS,
        "mamba_ssm.ops.triton.layer_norm": _NORMS,
        "mamba_ssm.ops.triton.layernorm_gated": {
            "RMSNorm": _absent_class("RMSNorm", f"with a gate {_MAMBA_2}"),
            "rmsnorm_fn": _AbsentFunction("rmsnorm_fn", _MAMBA_2),
        },
        "mamba_ssm.ops.triton.selective_state_update": _UPDATE,
        "mamba_ssm.ops.triton.ssd_combined": {name: _AbsentFunction(name, _MAMBA_2) for name in _SSD},
        "mamba_ssm.modules": {},
        "mamba_ssm.modules.mamba_simple": {
            "Mamba": mamba_ssm.Mamba, "Block": language_model.MixerBlock, **_SCAN, **_CONV, **_NORMS, **_UPDATE,
        },
        "mamba_ssm.modules.block": {"Block": language_model.Block},
        "mamba_ssm.modules.mha": _MHA,
        "mamba_ssm.modules.mlp": {"GatedMLP": language_model.GatedMLP},
        "mamba_ssm.modules.mamba2": {"Mamba2": _MAMBA_2_CLASSES["Mamba2"]},
        "mamba_ssm.modules.mamba2_simple": {"Mamba2Simple": _MAMBA_2_CLASSES["Mamba2Simple"]},
        "mamba_ssm.modules.mamba3": _MAMBA_3_CLASS,
        "mamba_ssm.models": {},
        "mamba_ssm.models.config_mamba": {"MambaConfig": language_model.MambaConfig},
        "mamba_ssm.models.mixer_seq_simple": {
            **_MODEL, "Mamba": mamba_ssm.Mamba, "Block": language_model.Block, **_NORMS,
        },
        "mamba_ssm.utils": {},
        "mamba_ssm.utils.generation": _names(inference, "GenerationMixin", "InferenceParams", "decode"),
        "mamba_ssm.utils.hf": _names(inference, "load_config_hf", "load_state_dict_hf"),
    },
    "causal_conv1d": {
        "causal_conv1d": {"__version__": "1.4.0+storm.kernels", **_CONV},
        "causal_conv1d.causal_conv1d_interface": {**_CONV, **_CONV_REFS},
        "causal_conv1d.causal_conv1d_varlen": {
            "causal_conv1d_varlen_states": causal_conv1d.causal_conv1d_varlen_states,
            "causal_conv1d_varlen_states_ref": causal_conv1d.causal_conv1d_varlen_states,
        },
        "causal_conv1d.cpp_functions": _names(
            compiled, "causal_conv1d_fwd_function", "causal_conv1d_bwd_function", "causal_conv1d_update_function"
        ),
    },
    **{
        name: {name: getattr(compiled, name)._asdict()}
        for name in ("selective_scan_cuda", "selective_scan_cuda_core", "selective_scan_cuda_oflex")
    },
    "causal_conv1d_cuda": {
        "causal_conv1d_cuda": {
            "causal_conv1d_fwd": compiled.causal_conv1d_fwd,
            "causal_conv1d_bwd": compiled.causal_conv1d_bwd,
            "causal_conv1d_update": compiled.causal_conv1d_update_compiled,
        },
    },
}  # fmt: skip
