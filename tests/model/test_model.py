"""model/: the parts compute what docs/spec.md says, the whole is greedy search over their sum,
variants share what they should.
"""

import dataclasses

import einops
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", reason="the extra `model` is not installed")

from storm_model.config import VARIANTS, LanguageConfig, ModelConfig, Variant, VisionConfig, preset, variant
from storm_model.pixels import FRAME_BATCH, preprocess
from storm_model.projector import VilaProjector
from storm_model.storm import VideoModel
from storm_model.vision import build_vision
from transformers import SiglipVisionConfig, SiglipVisionModel

from storm_kernels import TokenReduction
from storm_kernels.profiling import recording

TINY = ModelConfig(
    "tiny",
    VisionConfig(
        image_size=70, patch_size=14, width=32, layers=3, heads=2, mlp_width=64
    ),  # 5 x 5 patches: the downsample pads to 3 x 3
    LanguageConfig("qwen2", 2, 48, 4, 2, 96, 100, 1e4, 512, 1e-6),
    projector_layers=2,
)
PROMPT = torch.tensor([3, 1, 4])


def pixels(frames, size=70, seed=0):
    return torch.rand(frames, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- parts


@pytest.mark.parametrize("feature_layer", [-1, -2, -4])
def test_tower_is_transformers_hidden_state(feature_layer):
    layers = 4
    config = dataclasses.replace(TINY.vision, layers=layers, feature_layer=feature_layer)
    tower = build_vision(config)
    sizes = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=70,
        patch_size=14,
    )
    whole = SiglipVisionModel(sizes).eval()
    inner = getattr(whole, "vision_model", whole)
    inner.embeddings.load_state_dict(tower.embeddings.state_dict())
    for theirs, ours in zip(inner.encoder.layers, tower.layers, strict=False):
        theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        hidden = whole(pixels(2), output_hidden_states=True).hidden_states
        torch.testing.assert_close(tower(pixels(2)).flatten(1, 2), hidden[feature_layer])


@pytest.mark.parametrize("reduction", [TokenReduction(), TokenReduction(2, 2, 2), TokenReduction(4, 1, 1)])
def test_baseline_projector_is_spec(reduction):
    """Against einops and explicit blocks of tokens."""
    torch.manual_seed(0)
    projector = VilaProjector(8, 12).double()
    features = torch.randn(1, 7, 5, 5, 8, dtype=torch.float64)
    padded = F.pad(features, (0, 0, 0, 1, 0, 1))
    blocks = einops.rearrange(padded, "b t (h y) (w x) c -> b t h w (y x c)", y=2, x=2)
    normed = (blocks - blocks.mean(-1, keepdim=True)) / (blocks.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    normed = normed * projector.layers[1].weight + projector.layers[1].bias
    hidden = normed @ projector.layers[2].weight.T + projector.layers[2].bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    tokens = hidden @ projector.layers[4].weight.T + projector.layers[4].bias
    k, p, s = reduction.temporal_pool, reduction.spatial_pool, reduction.temporal_stride
    pooled = [
        tokens[0, t : t + k, i : i + p, j : j + p].reshape(-1, 12).mean(0)
        for t in list(range(0, 7, k))[::s]
        for i in range(0, 3, p)
        for j in range(0, 3, p)
    ]
    torch.testing.assert_close(projector(features, reduction)[0], torch.stack(pooled), rtol=1e-10, atol=1e-10)


def test_preprocess_scales_and_resizes():
    frames = torch.randint(0, 256, (FRAME_BATCH + 3, 20, 20, 3), dtype=torch.uint8)
    same = preprocess(frames, 20)
    torch.testing.assert_close(same, frames.permute(0, 3, 1, 2) / 255 * 2 - 1)
    resized = preprocess(frames, 14, torch.bfloat16)
    assert resized.shape == (FRAME_BATCH + 3, 3, 14, 14) and resized.dtype == torch.bfloat16
    assert resized.abs().max() <= 1
    for i in (0, FRAME_BATCH, FRAME_BATCH + 2):
        assert torch.equal(preprocess(frames[i : i + 1], 14, torch.bfloat16)[0], resized[i])
    flat = torch.full((1, 9, 30, 3), 51, dtype=torch.uint8)
    torch.testing.assert_close(preprocess(flat, 14), torch.full((1, 3, 14, 14), 51 / 255 * 2 - 1))


@pytest.mark.parametrize(
    "frames",
    [torch.zeros(2, 4, 4, 3), torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(0, 4, 4, 3, dtype=torch.uint8)],
)
def test_preprocess_refuses_what_is_not_frames(frames):
    with pytest.raises(ValueError, match=r"frames must be uint8 of shape \(n, H, W, 3\)"):
        preprocess(frames, 14)


# --- the whole model


def test_all_reductions_at_one_is_storm_without_reduction():
    model = VideoModel(TINY, Variant("ones", "all ones", True, TokenReduction(1, 1, 1)))
    features = model.encode(pixels(5))
    assert torch.equal(model.project(features), model.projector(features))
    assert torch.equal(model.project(features), model.switched(variant("storm")).project(features))


@pytest.mark.parametrize("name", list(VARIANTS))
def test_variants_reduce_the_projectors_tokens(name):
    """Against blocks of the unreduced tokens; 6 frames leave a last block of 2."""
    chosen = variant(name)
    k, p, s = chosen.reduction.temporal_pool, chosen.reduction.spatial_pool, chosen.reduction.temporal_stride
    model = VideoModel(TINY, chosen)
    features = model.encode(pixels(6))
    whole = model.projector(features)[0].unflatten(0, (6, 3, 3))
    blocks = [
        whole[t : t + k, i : i + p, j : j + p].reshape(-1, 48).mean(0)
        for t in list(range(0, 6, k))[::s]
        for i in range(0, 3, p)
        for j in range(0, 3, p)
    ]
    torch.testing.assert_close(model.project(features)[0], torch.stack(blocks))


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("frames", [1, 2])
def test_an_image_is_a_short_video(name, frames):
    assert VideoModel(TINY, variant(name))(pixels(frames), PROMPT).shape == (1, 100)


def test_encoding_in_batches_changes_nothing():
    model = VideoModel(TINY, variant("vila"))
    video = pixels(2 * FRAME_BATCH + 3)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(video)[0], torch.cat([model.vision(frame[None]) for frame in video]))


def test_prefill_is_causal_without_a_mask_and_makes_one_row_of_logits(monkeypatch):
    seen = []
    attention = F.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, is_causal=False, **options):
        seen.append((tuple(query.shape[-2:]), attn_mask, is_causal))
        return attention(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **options)

    model = VideoModel(TINY, variant("vila"))
    rows = []
    model.language.lm_head.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[1]))
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    logits, cache = model.prefill(torch.zeros(1, 40, 48), PROMPT)
    assert logits.shape == (1, 100) and rows == [1]
    assert seen == [((43, 12), None, True)] * 2
    assert cache.get_seq_length() == 43


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_generation_with_a_cache_is_greedy_search(family):
    config = dataclasses.replace(
        TINY, language=dataclasses.replace(TINY.language, family=family, tied_embeddings=family == "llama")
    )
    model = VideoModel(config, variant("storm-tp"), seed=2)
    ids = model.generate(pixels(6), PROMPT, 5)
    prompt = PROMPT
    for token in ids:
        assert model(pixels(6), prompt).argmax() == token
        prompt = torch.cat([prompt, token[None]])


def test_generation_stops_at_the_end_token():
    ids = VideoModel(TINY, variant("vila")).generate(pixels(3), PROMPT, 6)
    stop = ids[2].item()
    config = dataclasses.replace(TINY, language=dataclasses.replace(TINY.language, eos_ids=(stop,)))
    stopped = VideoModel(config, variant("vila")).generate(pixels(3), PROMPT, 6).tolist()
    assert stopped == ids.tolist()[: ids.tolist().index(stop) + 1]


def test_same_seed_same_weights_other_seed_others():
    one, two, other = (VideoModel(TINY, variant("storm"), seed=seed).state_dict() for seed in (4, 4, 5))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["language.lm_head.weight"], other["language.lm_head.weight"])
    state = torch.random.get_rng_state()
    VideoModel(TINY, variant("storm"))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("projector", ["reference", "fused"])
def test_switching_shares_weights(projector):
    model = VideoModel(TINY, variant("storm"), projector)
    own = dict(model.named_parameters())
    for chosen in VARIANTS.values():
        for kind in ("reference", "fused"):
            other = model.switched(chosen, kind)
            fresh = VideoModel(TINY, chosen, kind)
            for name, parameter in other.named_parameters():
                assert (own.get(name) is parameter) is (chosen.temporal or not name.startswith("projector")), name
                assert torch.equal(parameter, fresh.get_parameter(name))
            assert type(other.projector) is type(fresh.projector)
    assert dict(model.named_parameters()) == own


@pytest.mark.parametrize("name", ["storm", "storm-tp-sp-ts"])
def test_reference_and_fused_projector_agree(name):
    reference = VideoModel(TINY, variant(name), seed=1)
    fused = reference.switched(variant(name), "fused")
    assert type(fused.projector) is not type(reference.projector)
    torch.testing.assert_close(fused(pixels(9), PROMPT), reference(pixels(9), PROMPT))
    assert torch.equal(fused.generate(pixels(9), PROMPT, 6), reference.generate(pixels(9), PROMPT, 6))


class LargestFloat32(TorchDispatchMode):
    """Elements of the largest float32 tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return out


def test_bfloat16_is_built_without_a_float32_copy():
    with LargestFloat32() as mode:
        model = VideoModel(TINY, variant("storm"), dtype=torch.bfloat16)
    kept = {
        name.rpartition(".")[2] if "dt_proj" not in name else "dt"
        for name, p in model.named_parameters()
        if p.dtype == torch.float32
    }
    assert kept == {"A_log", "A_b_log", "D", "D_b", "dt"}
    assert (
        mode.elements <= 2 * TINY.language.width * 16
    )  # A_log, E x S; every weight matrix of the three parts is larger
    assert model(pixels(4).bfloat16(), PROMPT).dtype == torch.bfloat16


def test_storm_7b_takes_17_gigabytes_in_bfloat16():
    model = VideoModel(preset("storm-7b"), variant("storm"), device="meta", dtype=torch.bfloat16)
    assert 16e9 < sum(p.numel() * p.element_size() for p in model.parameters()) < 18.5e9


def test_stages():
    names = []

    class Recorder:
        def __init__(self, name):
            names.append(name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

    frames = torch.zeros(2, 70, 70, 3, dtype=torch.uint8)
    with recording(Recorder):
        VideoModel(TINY, variant("vila"))(preprocess(frames, 70), PROMPT)
    assert names == ["preprocess", "vision", "projector", "downsample", "mlp", "reduce", "prefill"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (torch.tensor([], dtype=torch.int64), r"P >= 1, got torch.int64 of shape \(0,\)"),
        (torch.tensor([1.0]), "got torch.float32"),
        (torch.zeros(2, 3, dtype=torch.int64), r"shape \(2, 3\)"),
        (torch.tensor([5, 100]), r"must lie in 0..99, got 5..100"),
        (torch.tensor([-1]), r"got -1..-1"),
    ],
)
def test_bad_prompts(prompt, message):
    with pytest.raises(ValueError, match=message):
        VideoModel(TINY, variant("vila"))(pixels(1), prompt)


def test_bad_arguments():
    with pytest.raises(ValueError, match="projector must be one of reference, fused, got 'fast'"):
        VideoModel(TINY, variant("storm"), "fast")
    with pytest.raises(ValueError, match="dtype must be one of .* got torch.int8"):
        VideoModel(TINY, variant("storm"), dtype=torch.int8)
    model = VideoModel(TINY, variant("vila"))
    with pytest.raises(ValueError, match="projector must be one of reference, fused, got 'fast'"):
        model.switched(variant("vila"), "fast")
    with pytest.raises(ValueError, match=r"pixels must have the shape \(T, 3, 70, 70\), got \(2, 3, 56, 56\)"):
        model.encode(pixels(2, 56))
    with pytest.raises(ValueError, match="max_new_tokens must be between .* got 0"):
        model.generate(pixels(1), PROMPT, 0)
