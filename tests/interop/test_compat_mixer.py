"""compat's ``Mamba``: construction in every spelling, names of parameters, forward, decoding; and install()."""

import inspect
import io
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch

from storm_kernels.interop import mamba_ssm
from storm_kernels.interop.inference import GenerationMixin, InferenceParams, load_config_hf, load_state_dict_hf
from storm_kernels.interop.mamba_ssm import Mamba

from ..support import original_mixers

# docs/compat.md, Call signatures.
BASE = {
    "A_log",
    "D",
    "in_proj.weight",
    "conv1d.weight",
    "conv1d.bias",
    "x_proj.weight",
    "dt_proj.weight",
    "dt_proj.bias",
    "out_proj.weight",
}
V2 = {"A_b_log", "D_b", "conv1d_b.weight", "conv1d_b.bias", "x_proj_b.weight", "dt_proj_b.weight", "dt_proj_b.bias"}
SPELLINGS = {
    "none": ({}, {"bimamba_type": "none"}, {"bimamba_type": None}, {"bimamba": False}, {"use_fast_path": False}),
    "v1": ({"bimamba_type": "v1"},),
    "v2": (
        {"bimamba_type": "v2"},
        {"bimamba": True},
        {"bimamba": True, "bimamba_type": "v2"},
        {"bimamba_type": "v2", "use_fast_path": False},
    ),
}


def test_signature_of_the_original_comes_first():
    parameters = inspect.signature(Mamba.__init__).parameters
    original = (
        "d_model, d_state=16, d_conv=4, expand=2, dt_rank='auto', dt_min=0.001, dt_max=0.1, dt_init='random', "
        "dt_scale=1.0, dt_init_floor=0.0001, "
        "conv_bias=True, bias=False, use_fast_path=True, layer_idx=None, device=None, dtype=None, "
        "bimamba_type='none', if_divide_out=False, "
        "init_layer_scale=None"
    )
    bare = [str(p.replace(annotation=p.empty)) for p in parameters.values()]
    assert ", ".join(bare).startswith(f"self, {original}")
    assert list(inspect.signature(Mamba.forward).parameters) == ["self", "hidden_states", "inference_params", "T"]


@pytest.mark.parametrize(("kind", "options"), [(k, o) for k, many in SPELLINGS.items() for o in many], ids=str)
def test_state_dict_of_every_spelling(kind, options):
    expected = BASE | {"none": set(), "v1": {"A_b_log"}, "v2": V2}[kind]
    mixer = Mamba(16, d_state=4, **options)
    assert set(mixer.state_dict()) == expected
    assert mixer.bimamba_type == kind
    assert set(Mamba(16, d_state=4, init_layer_scale=0.1, **options).state_dict()) == expected | {"gamma"}


def test_marks_and_precision_of_parameters():
    mixer = Mamba(16, d_state=4, bimamba_type="v2")
    assert all(getattr(mixer, name)._no_weight_decay for name in ("A_log", "D", "A_b_log", "D_b"))
    assert mixer.dt_proj.bias._no_reinit and mixer.dt_proj_b.bias._no_reinit
    v1 = Mamba(16, d_state=4, bimamba_type="v1").bfloat16()
    assert v1.A_b_log._no_weight_decay
    assert {v1.A_log.dtype, v1.A_b_log.dtype, v1.D.dtype, v1.dt_proj.bias.dtype} == {torch.float32}
    assert v1.in_proj.weight.dtype == torch.bfloat16


def test_dt_init():
    constant = Mamba(32, d_state=4, dt_init="constant", dt_scale=2.0)
    assert torch.all(constant.dt_proj.weight == 2.0 * constant.dt_rank**-0.5)
    assert Mamba(32, d_state=4, dt_scale=2.0).dt_proj.weight.abs().max() <= 2.0 * constant.dt_rank**-0.5
    start = torch.nn.functional.softplus(constant.dt_proj.bias)
    assert start.min() > 0.00099 and start.max() < 0.101


@pytest.mark.parametrize("divide", [{}, {"if_divide_out": True}, {"if_devide_out": True}], ids=str)
@pytest.mark.parametrize("bimamba_type", ["none", "v1", "v2"])
def test_forward_equals_the_plain_module(bimamba_type, divide):
    torch.manual_seed(0)
    plain = original_mixers.Mamba(
        16, bimamba_type=bimamba_type, if_devide_out=bool(divide), init_layer_scale=0.5, bias=True
    )
    ours = Mamba(16, d_state=8, bimamba_type=bimamba_type, init_layer_scale=1.0, bias=True, **divide)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 11, 16)
    expected = plain.double()(x.double())
    expected.square().sum().backward()
    out = ours(x, T=1)
    out.square().sum().backward()
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-4)
    for name, parameter in ours.named_parameters():
        reference = plain.get_parameter(name).grad
        assert (parameter.grad - reference).abs().max() <= 1e-4 * reference.abs().max(), name


def test_decoding_equals_the_whole_sequence():
    torch.manual_seed(0)
    mixer, x = Mamba(16, d_state=8, layer_idx=3).eval(), torch.randn(2, 9, 16)
    for prompt in (2, 6):  # shorter and longer than the convolution
        params = InferenceParams(max_seqlen=9, max_batch_size=2)
        with torch.no_grad():
            outs = [mixer(x[:, :prompt], inference_params=params)]
            for t in range(prompt, 9):
                params.seqlen_offset = t
                outs.append(mixer(x[:, t : t + 1], inference_params=params))
            torch.testing.assert_close(torch.cat(outs, 1), mixer(x), atol=1e-6, rtol=1e-4)
    conv_state, ssm_state = mixer.allocate_inference_cache(2, 100)
    assert (conv_state.shape, ssm_state.shape) == ((2, 32, 4), (2, 32, 8))


def test_bad_options_are_named():
    with pytest.raises(NotImplementedError, match="bimamba_type='v3' .SegMamba"):
        Mamba(16, bimamba_type="v3", nslices=8)
    with pytest.raises(ValueError, match="bimamba_type must be one of 'none', 'v1', 'v2', got 'v4'"):
        Mamba(16, bimamba_type="v4")
    with pytest.raises(ValueError, match="contradicts bimamba_type='v1'"):
        Mamba(16, bimamba=True, bimamba_type="v1")
    with pytest.raises(TypeError, match="unknown arguments: nslices=8"):
        Mamba(16, nslices=8)
    with pytest.raises(ValueError, match="dt_init must be 'random' or 'constant', got 'ones'"):
        Mamba(16, dt_init="ones")
    with pytest.raises(NotImplementedError, match="cannot decode step by step"):
        Mamba(16, bimamba=True, layer_idx=0)(torch.randn(1, 2, 16), inference_params=InferenceParams(2, 1))
    with pytest.raises(ValueError, match="layer_idx"):
        Mamba(16)(torch.randn(1, 2, 16), inference_params=InferenceParams(2, 1))
    with pytest.raises(ValueError, match="one token at a time.*got shape \\(1, 2, 16\\)"):
        mixer = Mamba(16)
        mixer.step(torch.randn(1, 2, 16), *mixer.allocate_inference_cache(1, 0))


class TinyLanguageModel(torch.nn.Module, GenerationMixin):
    def __init__(self):
        super().__init__()
        self.embedding, self.mixer = torch.nn.Embedding(11, 16), Mamba(16, d_state=4, layer_idx=0)

    def forward(self, tokens, inference_params=None):
        return self.mixer(self.embedding(tokens), inference_params=inference_params) @ self.embedding.weight.T


def test_greedy_generation_equals_recomputing_everything():
    torch.manual_seed(0)
    model, tokens = TinyLanguageModel().eval(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected = tokens
    for _ in range(5):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(tokens, max_length=8), expected)
    with pytest.raises(NotImplementedError, match="top_k must be 1 .* got 5"):
        model.generate(tokens, 8, top_k=5)


def test_load_from_a_folder(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    (tmp_path / "config.json").write_text('{"d_model": 16}')
    assert load_config_hf(str(tmp_path)) == {"d_model": 16}
    with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
        load_state_dict_hf(str(tmp_path))
    safetensors.save_file({"w": torch.ones(2)}, str(tmp_path / "model.safetensors"))
    assert load_state_dict_hf(str(tmp_path), dtype=torch.bfloat16)["w"].dtype == torch.bfloat16


def in_a_new_process(code: str, path: str = "") -> str:
    lines = [f"import sys; sys.path.insert(0, {path!r})"] if path else []
    code = "\n".join([*lines, textwrap.dedent(code)])
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


PACKAGES = (
    "mamba_ssm", "causal_conv1d", "selective_scan_cuda", "selective_scan_cuda_core", "selective_scan_cuda_oflex",
    "causal_conv1d_cuda",
)  # fmt: skip


def test_install_offers_what_vim_videomamba_and_bimba_import():
    out = in_a_new_process("""
        from storm_kernels.interop import install, uninstall
        print(install())
        import mamba_ssm, causal_conv1d
        from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
        from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn
        from mamba_ssm import Mamba, mamba_inner_fn, selective_scan_fn
        from mamba_ssm.modules.mamba_simple import Mamba
        from mamba_ssm.ops.selective_scan_interface import (
            bimamba_inner_fn, mamba_inner_fn, mamba_inner_fn_no_out_proj, selective_scan_fn, selective_scan_ref)
        from mamba_ssm.ops.triton.layer_norm import RMSNorm
        from mamba_ssm.ops.triton.layernorm import RMSNorm, layer_norm_fn, rms_norm_fn
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
        from mamba_ssm.utils.generation import GenerationMixin, InferenceParams
        from mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf
        assert mamba_ssm.ops.selective_scan_interface.selective_scan_fn is selective_scan_fn
        assert Mamba.__module__.startswith("storm_kernels")
        try:
            import mamba_ssm.modules.mamba4
        except ImportError as error:
            print(error)
        print(install())
        print(uninstall())
        try:
            import mamba_ssm
        except ImportError as error:
            print(error)
        try:
            uninstall()
        except RuntimeError as error:
            print(error)
    """)
    assert out.splitlines() == [
        *[f"{name}: resolves to storm_kernels" for name in PACKAGES],
        "No module named 'mamba_ssm.modules.mamba4'",
        *[f"{name}: left alone, it resolves to storm_kernels already" for name in PACKAGES],
        str(PACKAGES),
        "No module named 'mamba_ssm'",
        "uninstall: neither mamba_ssm nor causal_conv1d resolves to storm_kernels",
    ]


@pytest.mark.parametrize("imported", ["", "import mamba_ssm as original"], ids=["there", "imported"])
def test_install_never_shadows_silently(tmp_path, imported):
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("who = 'the original'")
    out = in_a_new_process(
        f"""
        from storm_kernels.interop import install, uninstall
        {imported}
        report = install()
        print(report.installed, "left alone" in str(report), {str(tmp_path)!r} in report.skipped["mamba_ssm"])
        import mamba_ssm
        print(mamba_ssm.who)
        print(install(replace=True).installed)
        import mamba_ssm
        print(hasattr(mamba_ssm, "who"))
        uninstall()
        import mamba_ssm
        print(mamba_ssm.who)
        """,
        str(tmp_path),
    )
    assert [line for line in out.splitlines() if not line.startswith(" ")] == [
        f"{PACKAGES[1:]} True True",
        "the original",
        "('mamba_ssm',)",
        "False",
        "the original",
        *[line for line in out.splitlines() if "UserWarning: storm_kernels takes the place of mamba_ssm at" in line],
    ]
    assert "UserWarning: storm_kernels takes the place of mamba_ssm at" in out


class Unpickler(pickle.Unpickler):
    """Finds the class of the original's name in compat, as it is found after install()."""

    def find_class(self, module, name):
        return Mamba if name == "Mamba" else super().find_class(module, name)


@pytest.mark.parametrize("bimamba_type", ["none", "v1", "v2"])
def test_models_pickled_by_the_original_move_and_cast(bimamba_type):
    """They have the original's attributes only; what stays in float32 stays so in them too."""
    torch.manual_seed(0)
    original, x = original_mixers.Mamba(16, bimamba_type=bimamba_type), torch.randn(1, 5, 16)
    mixer, expected = Unpickler(io.BytesIO(pickle.dumps(original))).load(), original(x)
    assert type(mixer) is Mamba
    torch.testing.assert_close(mixer.to("cpu")(x), expected, atol=1e-5, rtol=1e-4)
    mixer.bfloat16()
    kept = {"A_log", "D", "dt_proj.bias"} | {
        "none": set(),
        "v1": {"A_b_log"},
        "v2": {"A_b_log", "D_b", "dt_proj_b.bias"},
    }[bimamba_type]
    assert {name for name, p in mixer.named_parameters() if p.dtype == torch.float32} == kept
    torch.testing.assert_close(mixer(x.bfloat16()).float(), expected, atol=0.05, rtol=0)
    assert mixer.allocate_inference_cache(2, 0)[0].shape == (2, 32, 4)


def test_transformers_finds_what_is_installed():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 16):
        pytest.skip("transformers before 5.16 loops over tokens on a CPU, whatever is installed")
    out = in_a_new_process("""
        from storm_kernels import stats
        from storm_kernels.interop import install
        install()
        import torch
        from transformers import MambaConfig, MambaForCausalLM
        model = MambaForCausalLM(MambaConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1, state_size=4))
        tokens = torch.arange(1, 8)[None]
        model.eval().generate(tokens, max_new_tokens=3, do_sample=False)
        model.train()(tokens, labels=tokens).loss.backward()
        print(sorted(stats()))
    """)
    assert "['conv', 'conv_backward', 'scan', 'scan_backward']" in out
    assert "falling back" not in out


def test_names_that_mamba_ssm_exports():
    assert all(hasattr(mamba_ssm, name) for name in mamba_ssm.__all__)
