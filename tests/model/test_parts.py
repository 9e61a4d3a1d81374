"""The parts of model/: pixels and VILA's projector compute what docs/spec.md says; the whole encodes in
batches, reads a prompt in one causal call, and is built in its dtype.
"""

import einops
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", reason="the extra `model` is not installed")

from storm_model import StormForConditionalGeneration
from storm_model.pixels import FRAME_BATCH, preprocess
from storm_model.presets import VARIANTS, variant
from storm_model.projector import VilaProjector

from storm_kernels import TokenReduction
from storm_kernels.profiling import recording
from tests.support import ask_model


def pixels(frames, seed=0):
    return torch.rand(frames, 3, 56, 56, generator=torch.Generator().manual_seed(seed)) * 2 - 1


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


@pytest.mark.parametrize("name", list(VARIANTS))
@torch.no_grad()
def test_variants_reduce_the_projectors_tokens(name):
    """Against blocks of the unreduced tokens; 6 frames leave a last block of 2."""
    config = variant(name).of(ask_model.config(projector_implementation="reference", vision={"image_size": 70}))
    k, p, s = config.temporal_pool, config.spatial_pool, config.temporal_stride
    model = StormForConditionalGeneration(config).eval().model
    features = torch.randn(6, 5, 5, 32, generator=torch.Generator().manual_seed(0))
    whole = model.projector(features[None])[0].unflatten(0, (6, 3, 3))
    blocks = [
        whole[t : t + k, i : i + p, j : j + p].reshape(-1, 32).mean(0)
        for t in list(range(0, 6, k))[::s]
        for i in range(0, 3, p)
        for j in range(0, 3, p)
    ]
    torch.testing.assert_close(model.project(features, [6], [config.reduction])[0], torch.stack(blocks))


@torch.no_grad()
def test_encoding_in_batches_changes_nothing():
    model, video = ask_model.model().model, pixels(2 * FRAME_BATCH + 3)
    torch.testing.assert_close(model.encode(video), torch.cat([model.encode(frame[None]) for frame in video]))


@torch.no_grad()
def test_the_prompt_is_read_in_one_causal_call_without_a_mask(monkeypatch):
    seen = []
    attention = F.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, is_causal=False, **options):
        seen.append((tuple(query.shape[-2:]), attn_mask, is_causal))
        return attention(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **options)

    model = ask_model.model()
    features = model.get_video_features(pixels(10))
    ids = torch.tensor([[model.config.video_token_id] * 40 + [3, 1, 4]])
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model(ids, mm_encoder_outputs={"video": features}, use_cache=True, logits_to_keep=1)
    assert seen == [((43, 8), None, True)] * 2


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
        model = StormForConditionalGeneration._from_config(ask_model.config(), dtype=torch.bfloat16).eval()
    assert mode.elements <= 2 * 32 * 16  # A_log, E x S; every weight matrix of the three parts is larger
    ids = torch.tensor([[model.config.video_token_id] * 16 + [3]])
    assert model(ids, pixel_values_videos=pixels(4).bfloat16()).logits.dtype == torch.bfloat16


@torch.no_grad()
def test_stages():
    names = []

    class Recorder:
        def __init__(self, name):
            names.append(name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

    frames = torch.zeros(2, 56, 56, 3, dtype=torch.uint8)
    model = ask_model.model(projector_type="vila")
    ids = torch.tensor([[model.config.video_token_id] * 8 + [3]])
    with recording(Recorder):
        model(ids, pixel_values_videos=preprocess(frames, 56))
    assert names == ["preprocess", "vision", "projector", "downsample", "mlp", "reduce", "prefill", "prefill"]
