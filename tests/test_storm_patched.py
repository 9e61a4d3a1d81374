"""The complete model with the reference projector, patched and unpatched (RELIABILITY.md, R17)."""

import pytest
import torch

import storm_kernels as sk
from model.config import variant
from model.storm import VideoModel

from .test_model import PROMPT, TINY, pixels


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
