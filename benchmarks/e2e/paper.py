"""The paper's figures that ours are put beside (docs/spec.md, "The models to compare"; arXiv
2503.04130v4, Tables 2 and 13)."""

from __future__ import annotations

from typing import NamedTuple

MODEL = "Qwen2-7B with SigLIP at 448 px"
DEVICE = "A100-80G"
TABLE_2_FRAMES = 128  # the frames of `Variant.paper_latency_s`


class Latency(NamedTuple):
    """One row of Table 13, in milliseconds; ``compression`` is tokens before by tokens after the reduction."""

    frames: int
    compression: int
    total: float
    language: float
    vision: float
    projector: float


TABLE_13 = (
    Latency(128, 1, 4270, 3090, 1020, 163),
    Latency(128, 4, 1800, 622, 1010, 163),
    Latency(128, 8, 1500, 323, 1020, 163),
    Latency(256, 1, 10340, 7960, 2030, 348),
    Latency(256, 4, 3680, 1310, 2020, 349),
    Latency(256, 8, 3000, 623, 2030, 349),
    Latency(512, 8, 6200, 1310, 4070, 815),
)
