"""model/presets.py and arithmetic.py: presets have the published sizes, bad variants are refused,
arithmetic and memory are what PyTorch counts.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers", reason="the extra `model` is not installed")

from storm_benchmarks.e2e.models import Models
from storm_model import StormForConditionalGeneration
from storm_model.arithmetic import SCAN_PER_STATE, arithmetic, memory
from storm_model.presets import PRESETS, VARIANTS, Variant, preset, variant

from storm_kernels import TokenReduction
from tests.support import ask_model


def count(module):
    return sum(p.numel() for p in module.parameters())


def on_meta(config, dtype=torch.bfloat16):
    with torch.device("meta"):
        return StormForConditionalGeneration._from_config(config, dtype=dtype)


# --- presets and variants


def test_unknown_names_list_those_that_exist():
    with pytest.raises(
        ValueError, match=r"preset 'storm-9b' does not exist; there are: storm-7b, storm-8b, storm-1.5b, storm-mini"
    ):
        preset("storm-9b")
    with pytest.raises(
        ValueError, match=r"variant None does not exist; there are: vila, storm, storm-ts, .*storm-tp-sp-ts"
    ):
        variant(None)


def test_a_preset_is_the_callers_own():
    changed = preset("storm-mini")
    changed.text_config.hidden_size = 1
    assert preset("storm-mini").text_config.hidden_size == 640


@pytest.mark.parametrize("name", list(VARIANTS))
def test_variants_keep_what_the_paper_says(name):
    config = variant(name).of(preset("storm-7b"))
    grid = config.token_grid(128)
    kept = 100 * config.reduction.reduced(grid).tokens / grid.tokens
    assert kept == pytest.approx(variant(name).paper_kept_percent, abs=0.01)
    assert config.projector_type == ("vila" if name == "vila" else "storm")


@pytest.mark.parametrize(
    ("name", "billions", "source"),
    [
        ("storm-7b", 7.616, "Qwen/Qwen2-7B model card: 7.61 B, 6.53 B without embeddings"),
        ("storm-8b", 8.030, "arXiv 2407.21783: 8.03 B"),
        ("storm-1.5b", 1.544, "Qwen/Qwen2-1.5B model card: 1.54 B with the shared embedding once"),
    ],
)
def test_language_models_have_the_published_number_of_parameters(name, billions, source):
    model = on_meta(preset(name))
    language = count(model) - count(model.model.vision_tower) - count(model.model.projector)
    assert language / 1e9 == pytest.approx(billions, abs=6e-4), source
    assert {p.dtype for p in model.model.language_model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("name", "patches"), [("storm-7b", 32), ("storm-8b", 27)])
def test_vision_towers_have_the_published_sizes(name, patches):
    tower = on_meta(preset(name)).model.vision_tower
    # Per layer: two norms, four projections and the MLP, all with biases. so400m is named for 400
    # M: 27 such layers, embeddings and a pooling head.
    layer = 4 * 1152 + 4 * (1152**2 + 1152) + 2 * 1152 * 4304 + 1152 + 4304
    assert count(tower.encoder.layers) == 26 * layer
    assert count(tower.embeddings) == 3 * 14**2 * 1152 + 1152 + patches**2 * 1152
    assert count(tower) == count(tower.encoder.layers) + count(tower.embeddings)


def test_token_grids():
    sides = {name: preset(name).token_grid(1).height for name in PRESETS}
    assert sides == {"storm-7b": 16, "storm-8b": 14, "storm-1.5b": 14, "storm-mini": 4}


@pytest.mark.parametrize("frames", [0, -1, 10**9, 1.0, "8", True, None])
def test_bad_numbers_of_frames(frames):
    with pytest.raises((ValueError, TypeError), match=rf"frames.*{frames}"):
        ask_model.config().token_grid(frames)


@pytest.mark.parametrize("field", ["temporal_pool", "spatial_pool", "temporal_stride"])
@pytest.mark.parametrize("value", [0, -2, 10**9, 2.0, "2", False])
def test_bad_reductions(field, value):
    with pytest.raises((ValueError, TypeError), match=rf"{field}.*{value}"):
        Variant("x", "x", True, TokenReduction(**{field: value}))


# --- one model in all variants


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kinds_of_projector_share_what_they_have_in_common(dtype):
    models = Models(ask_model.config(), "cpu", dtype)
    state = torch.random.get_rng_state()
    taken = {kind: models.get(variant(name), kind) for name, kind in (("storm", "fused"), ("vila", "vila"))}
    fused = dict(models.get(variant("storm-ts"), "fused").named_parameters())
    plain = dict(models.get(variant("storm-ts"), "reference").named_parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert taken["fused"] is taken["vila"] and fused.keys() == plain.keys()
    assert all(fused[name] is plain[name] for name in fused)
    again = Models(ask_model.config(), "cpu", dtype)
    assert all(torch.equal(p, fused[name]) for name, p in again.get(variant("storm"), "fused").named_parameters())
    whole = {name.rpartition("mixer.")[2] for name, p in fused.items() if p.dtype == torch.float32}
    assert dtype == torch.float32 or whole == {"A_log", "A_b_log", "D", "D_b", "dt_proj.bias", "dt_proj_b.bias"}


@torch.inference_mode()
def test_the_first_tokens_logits_are_the_models_own():
    models = Models(ask_model.config(), "cpu", torch.float32)
    chosen = variant("storm-tp-sp")
    model = models.get(chosen, "reference")
    frames = torch.randint(0, 256, (6, 40, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels, config = models.pixels(frames), model.config
    tokens = chosen.reduction.reduced(config.token_grid(6)).tokens
    ids = torch.cat([torch.full((tokens,), config.video_token_id), models.prompt])[None]
    own = model(ids, pixel_values_videos=pixels[None], video_reductions=torch.tensor([[4, 2, 1]])).logits[:, -1:]
    for kind in ("reference", "fused"):
        torch.testing.assert_close(models.first_token(chosen, kind, models.encode(frames)), own)


# --- arithmetic and memory


def test_mini_shares_the_arithmetic_as_the_paper_does(capsys):
    flops = arithmetic(preset("storm-mini"), 128)
    total = sum(flops.values())
    shares = {part: 100 * value / total for part, value in flops.items()}
    with capsys.disabled():
        print(
            f"\nstorm-mini, 128 frames, {total / 1e9:.0f} GFLOP: "
            + ", ".join(f"{part} {share:.1f} %" for part, share in shares.items())
        )
    assert shares["language"] == pytest.approx(72, abs=3)
    assert shares["vision"] == pytest.approx(24, abs=3)
    assert shares["projector"] == pytest.approx(4, abs=1)


@pytest.mark.parametrize("name", ["vila", "storm-tp-sp", "storm-ts"])
@torch.no_grad()
def test_arithmetic_is_what_pytorch_counts(name):
    """FlopCounterMode sees products and convolutions (so attention must be made of products); not
    the scan, and all of a causal square. Some releases of transformers (5.17) make the rotary
    angles by a product, which is no part of the arithmetic."""
    frames, width, layers = 6, 32, 2
    vision = {"image_size": 70}  # 5 x 5 patches: the downsample pads to 3 x 3
    config = variant(name).of(ask_model.config(projector_implementation="reference", vision=vision))
    model = StormForConditionalGeneration(config).eval()
    grid = config.token_grid(frames)
    kept = config.reduction.reduced(grid).tokens
    counted = {}
    for part, run in {
        "vision": lambda: model.model.encode(torch.zeros(frames, 3, 70, 70)),
        "projector": lambda: model.model.project(torch.zeros(frames, 5, 5, 32), [frames], [config.reduction]),
        "language": lambda: model(inputs_embeds=torch.zeros(1, kept + 3, width), logits_to_keep=1),
    }.items():
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            run()
        by_module = counter.get_flop_counts().items()
        rotary = sum(sum(ops.values()) for module, ops in by_module if module.endswith(".rotary_emb"))
        counted[part] = counter.get_total_flops() - rotary
    upper_triangle = layers * 4 * width * (kept + 3) * (kept + 2) // 2
    # Layers, directions, FLOPs a state.
    scan = layers * 2 * SCAN_PER_STATE * grid.tokens * 2 * width * 16 * variant(name).temporal
    expected = arithmetic(config, frames, 3)
    assert counted["vision"] == expected["vision"]
    assert counted["language"] - upper_triangle == expected["language"]
    # The depthwise convolution is counted over its padded ends too: 3 further tokens, a direction
    # and layer.
    assert expected["projector"] - scan <= counted["projector"] <= (expected["projector"] - scan) * 1.01


def test_arithmetic_needs_no_weights():
    flops = arithmetic(variant("vila").of(preset("storm-7b")), 128)
    assert flops["language"] > 2 * 6.5e9 * 128 * 256  # two for each weight outside the embeddings and each token


@pytest.mark.parametrize("name", list(VARIANTS))
def test_storm_7b_at_512_frames_fits_80_gigabytes_in_bfloat16(name):
    config = variant(name).of(preset("storm-7b"))
    needed = memory(config, 512, prompt_tokens=64)
    assert max(needed.values()) < 80e9
    held = sum(p.numel() * p.element_size() for p in on_meta(config).parameters())
    assert 16e9 < held < 18.5e9
    assert needed["weights"] == pytest.approx(held, rel=1e-3)  # a few parameters stay float32
