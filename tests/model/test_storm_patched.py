"""The complete model: patched and unpatched over many seeds (docs/reliability.md, R17); twice from
one seed and one real clip.
"""

import pytest
import torch
from storm_model.config import preset, variant
from storm_model.pixels import preprocess
from storm_model.storm import VideoModel
from storm_model.video import sample_frames

import storm_kernels as sk

from .test_model import PROMPT, TINY, pixels
from .test_video import the_bikes_clip  # noqa: F401 (a fixture)


@pytest.mark.parametrize("seed", range(50))
def test_greedy_tokens_are_the_same(seed):
    name = ("storm", "storm-tp-ts", "storm-tp-sp-ts")[seed % 3]
    model = VideoModel(TINY, variant(name), projector="reference", seed=seed).eval()
    frames = pixels(5, seed=seed)
    forwards = [type(module) for module in model.modules()]
    expected = model.generate(frames, PROMPT, 5)
    sk.stats(reset=True)
    with sk.patched(model) as report:
        assert len(report.replaced) >= 1
        assert torch.equal(model.generate(frames, PROMPT, 5), expected)
    assert "scan" in sk.stats()
    assert [type(module) for module in model.modules()] == forwards
    assert torch.equal(model.generate(frames, PROMPT, 5), expected)


def test_the_same_seed_and_clip_give_the_same_tokens_twice(bikes):
    size = preset("storm-mini").vision.image_size
    runs = []
    for _ in range(2):
        model = VideoModel(preset("storm-mini"), variant("storm-tp-ts"), projector="fused", seed=3).eval()
        frames = sample_frames(bikes, 4, size=size).frames
        with torch.inference_mode():
            runs.append(model.generate(preprocess(frames, size, torch.float32), PROMPT, 6))
    assert torch.equal(*runs)
