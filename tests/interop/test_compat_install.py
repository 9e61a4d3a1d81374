"""install(): what other projects' files import is there, what we lack raises at the call, and
transformers trains what it infers.
"""

import importlib.metadata

import pytest

from .test_compat_mixer import in_a_new_process


def test_what_peers_import_is_there():
    """Lines of import as Vim, VideoMamba, BIMBA, VMamba, U-Mamba, SegMamba and mamba_ssm's own
    scripts have them (mamba 97 and 804, SegMamba 52).
    """
    out = in_a_new_process("""
        from storm_kernels.interop import install
        install()
        import causal_conv1d_cuda, selective_scan_cuda, selective_scan_cuda_core, selective_scan_cuda_oflex
        from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
        from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref, causal_conv1d_update_ref
        from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states, causal_conv1d_varlen_states_ref
        from causal_conv1d.cpp_functions import (
            causal_conv1d_bwd_function, causal_conv1d_fwd_function, causal_conv1d_update_function)
        from mamba_ssm import Mamba, Mamba2, MambaLMHeadModel
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import Block, MambaLMHeadModel, MixerModel, create_block
        from mamba_ssm.modules.block import Block
        from mamba_ssm.modules.mamba2 import Mamba2
        from mamba_ssm.modules.mamba2_simple import Mamba2Simple
        from mamba_ssm.modules.mamba3 import Mamba3
        from mamba_ssm.modules.mamba_simple import Block as FirstBlock, Mamba
        from mamba_ssm.modules.mha import MHA
        from mamba_ssm.modules.mlp import GatedMLP
        from mamba_ssm.ops.selective_scan_interface import (
            bimamba_inner_fn, bimamba_inner_ref, mamba_inner_fn, mamba_inner_fn_no_out_proj, mamba_inner_ref,
            rearrange, repeat, selective_scan_fn, selective_scan_ref)
        from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, layer_norm_ref, rms_norm_fn, rms_norm_ref
        from mamba_ssm.ops.triton.layernorm_gated import RMSNorm as RMSNormGated
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update, selective_state_update_ref
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
        from mamba_ssm.utils.generation import GenerationMixin, InferenceParams, decode
        import mamba_ssm
        from storm_kernels.interop import mamba_ssm as ours
        assert mamba_inner_fn is ours.mamba_inner_fn is mamba_ssm.mamba_inner_fn
        assert Block is not FirstBlock
        absences = (Mamba2, Mamba2Simple, Mamba3, MHA, RMSNormGated, mamba_chunk_scan_combined)
        for absent in (*absences, mamba_split_conv1d_scan_combined):
            try:
                absent(64)
            except NotImplementedError as error:
                print(error)
        names = {}
        exec("from mamba_ssm.ops.selective_scan_interface import *", names)
        assert names["mamba_inner_fn"] is mamba_inner_fn
        try:
            from mamba_ssm.ops.selective_scan_interface import nothing
        except ImportError as error:
            print(str(error).split(" (")[0])
    """)
    lines = out.splitlines()
    starts = [
        "Mamba2",
        "Mamba2Simple",
        "Mamba3",
        "MHA",
        "RMSNorm",
        "mamba_chunk_scan_combined",
        "mamba_split_conv1d_scan_combined",
    ]
    for line, name in zip(lines[:-1], starts, strict=True):
        assert line.startswith(f"{name} is not supported by storm_kernels: "), line
    assert lines[-1] == "cannot import name 'nothing' from 'mamba_ssm.ops.selective_scan_interface'"


def test_transformers_trains_what_it_infers_and_infers_what_it_did():
    """transformers issue 33234 and pull request 33195: in training, FalconMamba's norm of delta
    moved behind its projection.

    An activation other than SiLU, the padding, an adapter on x_proj: mamba_inner_fn knows none of
    them either. The same weights in transformers' modules imported before install() and after it.
    """
    for library in ("transformers", "peft"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    out = in_a_new_process("""
        import copy, importlib, sys
        import torch
        import transformers
        from peft import LoraConfig, get_peft_model
        from storm_kernels import stats
        from storm_kernels.interop import install

        def classes():
            names = {"FalconMamba": "falcon_mamba", "Mamba": "mamba", "Jamba": "jamba"}
            paths = {name: f"transformers.models.{path}.modeling_{path}" for name, path in names.items()}
            for path in paths.values():
                sys.modules.pop(path, None)
            return {name: getattr(importlib.import_module(path), f"{name}ForCausalLM") for name, path in paths.items()}

        torch.manual_seed(0)
        ids, mask = torch.randint(1, 31, (2, 9)), torch.ones(2, 9, dtype=torch.long)
        mask[0, :4] = 0
        sizes = dict(vocab_size=31, hidden_size=16, num_hidden_layers=2)
        attention = dict(num_attention_heads=2, num_key_value_heads=1, attn_layer_period=2, attn_layer_offset=1)
        options = {
            "FalconMamba": [{}], "Mamba": [{}, {"hidden_act": "gelu"}],
            "Jamba": [dict(hidden_act="gelu", intermediate_size=32, num_experts=1, num_experts_per_tok=1,
                           mamba_d_state=4, **attention)],
        }
        before, shimmed = classes(), install() and classes()
        for name in options:
            for option in options[name]:
                config = getattr(transformers, f"{name}Config")(**sizes, **option)
                plain, model = before[name](config), shimmed[name](config)
                with torch.no_grad():
                    for parameter in plain.parameters():
                        if parameter.dim() > 1:
                            parameter += 0.2 * torch.randn_like(parameter)
                model.load_state_dict(plain.state_dict())
                pairs = [(plain.eval(), model.eval())]
                if name == "FalconMamba":
                    places = ["x_proj", "in_proj"]
                    lora = LoraConfig(r=2, lora_dropout=0.0, init_lora_weights=False, target_modules=places)
                    pairs.append([get_peft_model(copy.deepcopy(m), lora) for m in (plain, model)])
                    pairs[1][1].load_state_dict(pairs[1][0].state_dict())
                for one, other in pairs:
                    for attention_mask in (None, mask):
                        expected = one.eval()(ids, attention_mask=attention_mask, use_cache=False).logits[:, 4:]
                        stats(reset=True)
                        found = [m(ids, attention_mask=attention_mask, use_cache=False).logits[:, 4:]
                                 for m in (other.eval(), other.train())]
                        near = [bool((logits - expected).abs().max() < 1e-5 * expected.abs().max()) for logits in found]
                        print(name, near, sorted(stats()))
                    found[1].sum().backward()
                tokens = [m.eval().generate(ids[:1], max_new_tokens=6, do_sample=False, pad_token_id=0)
                          for m in pairs[0]]
                print("tokens", bool((tokens[0] == tokens[1]).all()))
    """)
    lines = [line for line in out.splitlines() if line.startswith(("FalconMamba [", "Mamba [", "Jamba [", "tokens "))]
    version = tuple(map(int, importlib.metadata.version("transformers").split(".")[:2]))
    ran = ["conv", "scan"] if version >= (5, 16) else []  # before, it loops over tokens on a CPU, whatever is installed
    once = [f"{{}} [True, True] {ran}"] * 2
    expected = [*once, *once, "tokens True", *once, "tokens True", *once, "tokens True", *once, "tokens True"]
    names = ["FalconMamba"] * 5 + ["Mamba"] * 6 + ["Jamba"] * 3
    assert lines == [line.format(name) for line, name in zip(expected, names, strict=True)]
