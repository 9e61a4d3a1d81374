"""mamba_ssm's language model: parameter names, blocks, checkpoints, greedy decoding in every spelling."""

import json

import pytest
import torch
import torch.nn.functional as F

from storm_kernels.interop import inference
from storm_kernels.interop.language_model import Block, GatedMLP, MambaConfig, MambaLMHeadModel, MixerBlock
from storm_kernels.interop.mixer import Mamba
from storm_kernels.interop.norms import RMSNorm

SMALL = {"d_model": 16, "n_layer": 2, "vocab_size": 29, "ssm_cfg": {"d_state": 4}}


def small(**entries) -> MambaLMHeadModel:
    torch.manual_seed(0)
    model = MambaLMHeadModel(MambaConfig(**(SMALL | entries))).eval()
    for parameter in model.backbone.layers.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def test_names_and_shapes():
    model = small()
    state = model.state_dict()
    assert state["lm_head.weight"].shape == (32, 16)  # the vocabulary padded to a multiple of 8
    assert model.lm_head.weight is model.backbone.embedding.weight
    layer = {f"mixer.{name}" for name in Mamba(16).state_dict()} | {"norm.weight"}
    expected = {f"backbone.layers.{i}.{name}" for i in range(2) for name in layer}
    assert set(state) == expected | {"backbone.embedding.weight", "backbone.norm_f.weight", "lm_head.weight"}
    assert "backbone.layers.0.mlp.fc1.weight" in small(d_intermediate=8).state_dict()
    assert small(tie_embeddings=False).lm_head.weight is not model.backbone.embedding.weight


@pytest.mark.parametrize("entries", [{}, {"d_intermediate": 8}, {"rms_norm": False}], ids=["rms", "mlp", "layer norm"])
def test_fused_and_separate_norms_compute_the_plain_model(entries):
    tokens = torch.tensor([[1, 5, 2, 7, 3]])
    fused, separate = small(**entries), small(**entries, fused_add_norm=False)
    separate.load_state_dict(fused.state_dict())
    hidden = fused.backbone.embedding(tokens)
    for layer in fused.backbone.layers:
        hidden = hidden + layer.mixer(plain_norm(hidden, layer.norm))
        if layer.mlp is not None:
            value, gate = layer.mlp.fc1(plain_norm(hidden, layer.norm2)).chunk(2, -1)
            hidden = hidden + layer.mlp.fc2(value * F.silu(gate))
    expected = F.linear(plain_norm(hidden, fused.backbone.norm_f), fused.lm_head.weight)
    for model in (fused, separate):
        torch.testing.assert_close(model(tokens).logits, expected)
    torch.testing.assert_close(fused(tokens, num_last_tokens=2).logits, expected[:, -2:])


def plain_norm(x, norm):
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps) if isinstance(norm, RMSNorm) else norm(x)


def test_generation_in_every_greedy_spelling():
    """mamba issue 414: temperature=0 with the default top_k=1 is greedy; scores, a teacher, an end
    and a streamer work as in the original.
    """
    model, tokens = small(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected, scores = tokens, []
    for _ in range(5):
        scores.append(model(expected).logits[:, -1])
        expected = torch.cat([expected, scores[-1].argmax(-1, keepdim=True)], 1)
    for options in (
        {},
        {"temperature": 0.0},
        {"top_k": 1, "top_p": 0.9, "min_p": 0.1, "temperature": 0.7},
        {"cg": True, "enable_timing": True},
    ):
        assert torch.equal(model.generate(tokens, max_length=8, **options), expected)
    found = model.generate(tokens, 8, return_dict_in_generate=True, output_scores=True)
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(scores), atol=1e-5, rtol=1e-5)
    assert inference.decode(tokens, model, 8).scores is None
    taught = inference.decode(tokens, model, 8, teacher_outputs=torch.full((2, 5), 7)).sequences
    assert (taught[:, 3:5] == 7).all() and torch.equal(taught[:, :3], tokens)
    assert (inference.decode(tokens, model, 30, vocab_size=5).sequences[:, 3:] < 5).all()
    end = int(expected[0, 3])
    assert inference.decode(tokens[:1], model, 8, eos_token_id=end).sequences.shape == (1, 4)
    streamed = []
    streamer = type(
        "Streamer", (), {"put": lambda self, x: streamed.append(x), "end": lambda self: streamed.append(None)}
    )()
    model.generate(tokens, 8, streamer=streamer)
    assert torch.equal(torch.cat(streamed[:-1], 1), expected) and streamed[-1] is None
    with pytest.raises(NotImplementedError, match="got 0 and 1.2"):
        model.generate(tokens, 8, top_k=0, repetition_penalty=1.2)


def test_checkpoints(tmp_path):
    model, tokens = small(), torch.tensor([[1, 5, 2, 7, 3]])
    model.save_pretrained(tmp_path / "own")
    assert json.loads((tmp_path / "own" / "config.json").read_text())["d_model"] == 16
    again = MambaLMHeadModel.from_pretrained(str(tmp_path / "own"))
    assert torch.equal(again.eval()(tokens).logits, model(tokens).logits)
    half = MambaLMHeadModel.from_pretrained(str(tmp_path / "own"), dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16 and half.backbone.layers[0].mixer.A_log.dtype == torch.float32
    assert (half(tokens).logits.float() - model(tokens).logits).abs().max() < 0.1


def test_safetensors_without_the_tied_weight(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    model, tokens = small(), torch.tensor([[1, 5, 2, 7, 3]])
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    weights = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    safetensors.save_file(weights, str(tmp_path / "model.safetensors"))
    assert torch.equal(MambaLMHeadModel.from_pretrained(str(tmp_path)).eval()(tokens).logits, model(tokens).logits)


def test_a_checkpoint_of_transformers_is_named(tmp_path):
    """mamba issue 253: the config.json of "-hf" checkpoints is transformers'; the error says which class loads it."""
    (tmp_path / "config.json").write_text('{"_name_or_path": "state-spaces/mamba-130m-hf", "hidden_size": 16}')
    with pytest.raises(
        ValueError,
        match="has no '_name_or_path', 'hidden_size'; if it is transformers', "
        "load it with transformers.AutoModelForCausalLM",
    ):
        MambaLMHeadModel.from_pretrained(str(tmp_path))


def test_a_pickle_is_not_read(tmp_path):
    torch.save({"w": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match="no model.safetensors; a pickled pytorch_model.bin is not read: convert it"
    ):
        inference.load_state_dict_hf(str(tmp_path))


def test_blocks_of_both_generations():
    """In mamba_ssm 1.x the class of the norm comes third, in 2.x that of the MLP."""
    first, second = MixerBlock(16, Mamba, RMSNorm, True, True), Block(16, Mamba, torch.nn.Identity, RMSNorm, True, True)
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 5, 16)
    for mine, other in zip(first(x), second(x), strict=True):
        torch.testing.assert_close(mine, other)
    assert [t.shape[0] for t in first.allocate_inference_cache(3, 10)] == [3, 3]
    with pytest.raises(
        TypeError, match="fused_add_norm wants norm_cls to make a LayerNorm or mamba_ssm's RMSNorm, got Identity"
    ):
        MixerBlock(16, Mamba, lambda dim: torch.nn.Identity(), fused_add_norm=True)
    mlp = GatedMLP(16, 100)
    assert mlp.fc1.weight.shape == (256, 16) and mlp(x).shape == x.shape


def test_training_and_what_is_not_supported():
    model, tokens = small().train(), torch.tensor([[1, 5, 2, 7, 3]])
    F.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:]).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    with pytest.raises(NotImplementedError, match=r"ssm_cfg\['layer'\] is 'Mamba2': only 'Mamba1' is supported"):
        small(ssm_cfg={"layer": "Mamba2"})
    with pytest.raises(NotImplementedError, match=r"attn_layer_idx=\[1\]: attention layers \(MHA\) are not supported"):
        small(attn_layer_idx=[1])
