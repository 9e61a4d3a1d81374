"""The complete model: patched and unpatched over many seeds (docs/reliability.md, R17)."""

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `model` is not installed")

import storm_kernels as sk
from tests.support import ask_model


@pytest.mark.parametrize("seed", range(50))
def test_greedy_tokens_are_the_same(seed):
    pool, stride = ((1, 1), (4, 2), (2, 1))[seed % 3]
    model = ask_model.model(seed=seed, projector_implementation="reference", temporal_pool=pool, temporal_stride=stride)
    frames = torch.rand(5, 3, 56, 56, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    tokens = model.config.reduction.reduced(model.config.token_grid(5)).tokens
    ids = torch.tensor([[model.config.video_token_id] * tokens + [43, 41, 44]])

    def written():
        return model.generate(
            ids, pixel_values_videos=frames, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
        )

    classes = [type(module) for module in model.modules()]
    expected = written()
    sk.stats(reset=True)
    with sk.patched(model) as report:
        assert len(report.replaced) >= 1
        assert torch.equal(written(), expected)
    assert "scan" in sk.stats()
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(written(), expected)
