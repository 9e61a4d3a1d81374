"""model/config.py and arithmetic.py: presets have the published sizes, bad ones are refused, the
arithmetic is what PyTorch counts.
"""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers", reason="the extra `model` is not installed")

from storm_model.arithmetic import SCAN_PER_STATE, arithmetic
from storm_model.config import PRESETS, VARIANTS, Variant, preset, variant
from storm_model.language import build_language
from storm_model.storm import VideoModel
from storm_model.vision import build_vision

from storm_kernels import TokenReduction

from .test_model import PROMPT, TINY, pixels


def count(module):
    return sum(p.numel() for p in module.parameters())


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


@pytest.mark.parametrize("name", list(VARIANTS))
def test_variants_keep_what_the_paper_says(name):
    chosen = variant(name)
    grid = preset("storm-7b").token_grid(128)
    kept = 100 * chosen.reduction.reduced(grid).tokens / grid.tokens
    assert kept == pytest.approx(chosen.paper_kept_percent, abs=0.01)


@pytest.mark.parametrize(
    ("name", "billions", "source"),
    [
        ("storm-7b", 7.616, "Qwen/Qwen2-7B model card: 7.61 B, 6.53 B without embeddings"),
        ("storm-8b", 8.030, "arXiv 2407.21783: 8.03 B"),
        ("storm-1.5b", 1.544, "Qwen/Qwen2-1.5B model card: 1.54 B with the shared embedding once"),
    ],
)
def test_language_models_have_the_published_number_of_parameters(name, billions, source):
    with torch.device("meta"):
        language = build_language(preset(name).language, torch.bfloat16)
    assert count(language) / 1e9 == pytest.approx(billions, abs=6e-4), source
    assert {p.dtype for p in language.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("name", "patches"), [("storm-7b", 32), ("storm-8b", 27)])
def test_vision_towers_have_the_published_sizes(name, patches):
    config = preset(name).vision
    assert config.patches_per_side == patches
    with torch.device("meta"):
        tower = build_vision(config)
    # Per layer: two norms, four projections and the MLP, all with biases. so400m is named for 400
    # M: 27 such layers, embeddings and a pooling head.
    layer = 4 * 1152 + 4 * (1152**2 + 1152) + 2 * 1152 * 4304 + 1152 + 4304
    assert count(tower.layers) == 26 * layer
    assert count(tower.embeddings) == 3 * 14**2 * 1152 + 1152 + patches**2 * 1152


def test_token_grids():
    sides = {name: preset(name).token_grid(1).height for name in PRESETS}
    assert sides == {"storm-7b": 16, "storm-8b": 14, "storm-1.5b": 14, "storm-mini": 4}


@pytest.mark.parametrize("frames", [0, -1, 10**9, 1.0, "8", True, None])
def test_bad_numbers_of_frames(frames):
    with pytest.raises((ValueError, TypeError), match=rf"frames.*{frames}"):
        TINY.token_grid(frames)


@pytest.mark.parametrize("field", ["temporal_pool", "spatial_pool", "temporal_stride"])
@pytest.mark.parametrize("value", [0, -2, 10**9, 2.0, "2", False])
def test_bad_reductions(field, value):
    with pytest.raises((ValueError, TypeError), match=rf"{field}.*{value}"):
        Variant("x", "x", True, TokenReduction(**{field: value}))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vision", {"heads": 5}, "heads must divide width 32, got 5"),
        ("vision", {"image_size": 7}, "patch_size must be at most image_size 7, got 14"),
        ("vision", {"feature_layer": -4}, "feature_layer must be an integer from -3 to -1, got -4"),
        ("language", {"kv_heads": 3}, "kv_heads must divide heads 4, got 3"),
        ("language", {"family": "gpt"}, "family must be .* got 'gpt'"),
        ("language", {"vocabulary": 0}, "vocabulary must be between .* got 0"),
    ],
)
def test_bad_sizes(part, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(getattr(TINY, part), **change)


# --- arithmetic


def test_mini_shares_the_arithmetic_as_the_paper_does(capsys):
    flops = VideoModel(preset("storm-mini"), variant("storm"), device="meta").arithmetic(128)
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
def test_arithmetic_is_what_pytorch_counts(name):
    """FlopCounterMode sees products and convolutions (so attention must be made of products); not
    the scan, and all of a causal square. Some releases of transformers (5.17) make the rotary
    angles by a product, which is no part of the arithmetic."""
    model, frames = VideoModel(TINY, variant(name)), 6
    counted = {}
    with torch.no_grad():
        for part, run in {
            "vision": lambda: model.encode(pixels(frames)),
            "projector": lambda: model.project(torch.zeros(1, frames, 5, 5, 32)),
            "language": lambda: model.prefill(
                torch.zeros(1, variant(name).reduction.reduced(TINY.token_grid(frames)).tokens, 48), PROMPT
            ),
        }.items():
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                run()
            rotary = sum(
                sum(ops.values()) for module, ops in counter.get_flop_counts().items() if module.endswith(".rotary_emb")
            )
            counted[part] = counter.get_total_flops() - rotary
    tokens = variant(name).reduction.reduced(TINY.token_grid(frames)).tokens + len(PROMPT)
    upper_triangle = 2 * 4 * 48 * tokens * (tokens - 1) // 2  # layers, FLOPs a pair and channel, channels, pairs
    scan = (
        2 * 2 * SCAN_PER_STATE * TINY.token_grid(frames).tokens * 96 * 16 * variant(name).temporal
    )  # layers, directions, FLOPs a state
    expected = model.arithmetic(frames, len(PROMPT))
    assert counted["vision"] == expected["vision"]
    assert counted["language"] - upper_triangle == expected["language"]
    # The depthwise convolution is counted over its padded ends too: 3 further tokens, a direction
    # and layer.
    assert expected["projector"] - scan <= counted["projector"] <= (expected["projector"] - scan) * 1.01


def test_arithmetic_needs_no_weights():
    flops = arithmetic(preset("storm-7b"), variant("vila"), 128)
    assert flops["language"] > 2 * 6.5e9 * 128 * 256  # two for each weight outside the embeddings and each token
