"""Launch configurations as data; nothing is autotuned at run time.

The numbers were chosen by machine code (sm_90, `python -m tools.kernel_mix`, Triton 3.9), not
measured on a GPU. A *slot* is one instruction of one warp. An *item* is one (channel, token, state)
of a scan, for each lane of a warp. Budgets are slots per item of the hottest loops; the tool
enforces them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    """The constexpr arguments of a kernel that only matter for speed, and how it is compiled."""

    constants: dict[str, int]
    num_warps: int = 1
    num_stages: int = 1
    max_registers: int | None = None  # NVIDIA only
    budget: float | None = None  # slots per item

    def options(self) -> dict[str, int | bool]:
        # Fusing a*b+c is on by default today and off from triton 3.10: the recurrence is one such
        # operation, so say it.
        options = {
            **self.constants,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }
        if self.max_registers is not None and torch.version.hip is None:
            options["maxnreg"] = self.max_registers
        return options


# One warp of 32 channels: each lane keeps the 16 states of its channel, so y is a sum inside a
# lane, without shuffles. 64 channels save half a slot per item (B and C are loaded once for two
# channels) but leave half of an H100's schedulers idle at 7168 channels. Segments of 4 tokens. Slots
# with softplus, D and checkpoints, sm_80 / sm_90 / sm_100: both directions 8.9 / 8.9 / 7.4; one
# with its gate 10.2 / 10.2 / 8.5; both reduced, each gated, adding to its cell's sum, 10.4 / 10.4 /
# 8.9. 255 registers: left to itself ptxas stops at 168 and spills.
SCAN_FORWARD = Config({"BLOCK_E": 32, "SEGMENT": 4}, max_registers=255, budget=11.0)
# Backward keeps a segment's states and decays in registers: 2 tokens take 32 slots, and 8 for the
# recomputation; 4 tokens spill. Sums of 32 tokens (16 segments) are short enough to be as exact as
# torch's pairwise ones and make the traffic of adding them up negligible.
SCAN_BACKWARD = Config({"BLOCK_E": 32, "SEGMENT": 2, "FLUSH": 16}, max_registers=255, budget=42.0)
# The adjoint of pooling and the sum of partials move memory and compute nothing: 8 elements a lane
# are one 16-byte access in bfloat16.
ROWS = Config({"BLOCK_R": 16, "BLOCK_C": 64}, num_warps=4)
# Pooling needs an address for each row: 4 elements a lane take 40 registers, where 8 spill on
# Triton 3.7 and 3.8. The limit is for ptxas, which may stop at 32 of itself.
POOL = Config({"BLOCK_R": 16, "BLOCK_C": 64}, num_warps=8, max_registers=48)
# 8 elements a lane along channels are one 16-byte load in bfloat16; the 7 taps of a 64-token tile
# come from the first-level cache. 184 registers.
CONV = Config({"BLOCK_T": 64, "BLOCK_E": 64}, num_warps=4)
# Backward keeps a window of 7 tiles in registers, 8 elements a lane each: 247 registers.
CONV_BACKWARD = Config({"BLOCK_T": 32, "BLOCK_E": 32}, num_warps=4)
# K-1 tokens a sequence: too little work for the numbers to matter.
CONV_STATE = Config({"BLOCK_E": 128})
