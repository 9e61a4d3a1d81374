"""What a random case is: one call of an operation, its operands drawn from a seed and laid out in
memory in one of several ways.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor

import storm_kernels as sk

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = ("dense", "sliced", "transposed", "batch_broadcast", "time_broadcast")


@dataclass(frozen=True)
class ScanCase:
    """One call of selective_scan or, with ``direction`` "both", of bidirectional_selective_scan."""

    seed: int
    batch: int
    length: int  # without a reduction
    grid: tuple[int, int, int]  # with one
    channels_per_group: int
    groups: int
    states: int
    direction: str  # "forward", "reverse", "both"
    dtype: str
    dtype_delta: str
    dtype_state: str  # of B and C
    layout: str
    layout_state: str
    softplus: bool
    D: bool
    z: str  # "none", "all", "kept"
    bias: bool
    initial: bool
    packed: bool
    reduction: tuple[int, int, int]

    @property
    def token_reduction(self) -> sk.TokenReduction | None:
        return None if self.packed or self.reduction == (1, 1, 1) else sk.TokenReduction(*self.reduction)

    @property
    def token_grid(self) -> sk.TokenGrid | None:
        return None if self.token_reduction is None else sk.TokenGrid(*self.grid)

    def operands(self) -> dict[str, Tensor]:
        draw = Draw(self.seed)
        length = self.length if self.token_grid is None else self.token_grid.tokens
        batch = 1 if self.packed else self.batch
        channels = self.channels_per_group * self.groups
        u, delta, state = DTYPES[self.dtype], DTYPES[self.dtype_delta], DTYPES[self.dtype_state]
        found = {}
        for suffix in ("", "_b") if self.direction == "both" else ("",):
            found[f"u{suffix}"] = draw.normal(u, self.layout, batch, length, channels)
            raw = draw.normal(delta, self.layout, batch, length, channels)
            found[f"delta{suffix}"] = raw if self.softplus else raw.abs() * 0.5
            found[f"A{suffix}"] = -torch.exp(draw.normal(torch.float32, "dense", channels, self.states))
            for name in ("B", "C"):
                value = draw.normal(state, self.layout_state, batch, length, self.groups, self.states)
                found[name + suffix] = value.squeeze(2) if self.groups == 1 else value
            if self.D:
                found[f"D{suffix}"] = draw.normal(torch.float32, "dense", channels)
            if self.bias:
                found[f"delta_bias{suffix}"] = draw.normal(torch.float32, "dense", channels).abs()
        if self.z != "none":
            kept = self.z == "kept" and self.token_reduction is not None
            tokens = self.token_reduction.kept(self.token_grid).tokens if kept else length
            found["z"] = draw.normal(u, self.layout, batch, tokens, channels)
        if self.initial and self.direction != "both":
            sequences = len(self.bounds(length)) - 1 if self.packed else batch
            found["initial_state"] = draw.normal(torch.float32, "dense", sequences, channels, self.states)
        return found

    def bounds(self, length: int) -> list[int]:
        return Draw(self.seed).bounds(length)

    def layout_of(self, name: str) -> str:
        if name[0] in "uz" or name.startswith("delta") and "bias" not in name:
            return self.layout
        return self.layout_state if name[0] in "BC" else "dense"

    def call(self, room, operands: dict[str, Tensor], **options) -> dict[str, Tensor]:
        t = operands
        options |= {"delta_softplus": self.softplus, "grid": self.token_grid, "reduction": self.token_reduction}
        if self.packed:
            options["cu_seqlens"] = torch.tensor(self.bounds(t["u"].shape[1]), device=t["u"].device)
        if self.direction == "both":
            names = ("u", "delta", "A", "B", "C", "D", "delta_bias")
            forward, backward = (sk.Direction(*(t.get(name + suffix) for name in names)) for suffix in ("", "_b"))
            return {"out": room.bidirectional_selective_scan(forward, backward, t.get("z"), **options)}
        options |= {
            "initial_state": t.get("initial_state"),
            "return_final_state": True,
            "reverse": self.direction == "reverse",
        }
        args = (t[name] for name in ("u", "delta", "A", "B", "C"))
        out, state = room.selective_scan(*args, t.get("D"), t.get("z"), t.get("delta_bias"), **options)
        return {"out": out, "final_state": state}


@dataclass(frozen=True)
class ConvCase:
    """One call of causal_conv1d or, with ``direction`` "both", of bidirectional_causal_conv1d."""

    seed: int
    batch: int
    length: int
    channels: int
    width: int
    direction: str
    dtype: str
    layout: str
    silu: bool
    bias: bool
    initial: bool
    packed: bool

    def operands(self) -> dict[str, Tensor]:
        draw = Draw(self.seed)
        batch = 1 if self.packed else self.batch
        found = {"x": draw.normal(DTYPES[self.dtype], self.layout, batch, self.length, self.channels)}
        for suffix in ("", "_b") if self.direction == "both" else ("",):
            found[f"weight{suffix}"] = draw.normal(torch.float32, "dense", self.channels, self.width)
            if self.bias:
                found[f"bias{suffix}"] = draw.normal(torch.float32, "dense", self.channels)
        if self.initial and self.direction != "both":
            sequences = len(draw.bounds(self.length)) - 1 if self.packed else batch
            found["initial_state"] = draw.normal(torch.float32, "dense", sequences, self.channels, self.width - 1)
        return found

    def layout_of(self, name: str) -> str:
        return self.layout if name == "x" else "dense"

    def call(self, room, operands: dict[str, Tensor], **options) -> dict[str, Tensor]:
        t = operands
        options["activation"] = "silu" if self.silu else None
        if self.packed:
            options["cu_seqlens"] = torch.tensor(Draw(self.seed).bounds(self.length), device=t["x"].device)
        if self.direction == "both":
            outs = room.bidirectional_causal_conv1d(
                t["x"], t["weight"], t.get("bias"), t["weight_b"], t.get("bias_b"), **options
            )
            return dict(zip(("out", "out_b"), outs, strict=True))
        options |= {
            "initial_state": t.get("initial_state"),
            "return_final_state": True,
            "reverse": self.direction == "reverse",
        }
        return dict(
            zip(("out", "final_state"), room.causal_conv1d(t["x"], t["weight"], t.get("bias"), **options), strict=True)
        )


@dataclass(frozen=True)
class ReduceCase:
    """One call of reduce_tokens."""

    seed: int
    batch: int
    grid: tuple[int, int, int]
    channels: int
    dtype: str
    layout: str
    reduction: tuple[int, int, int]

    def operands(self) -> dict[str, Tensor]:
        tokens = sk.TokenGrid(*self.grid).tokens
        return {"x": Draw(self.seed).normal(DTYPES[self.dtype], self.layout, self.batch, tokens, self.channels)}

    def layout_of(self, name: str) -> str:
        return self.layout

    def call(self, room, operands: dict[str, Tensor], **options) -> dict[str, Tensor]:
        return {
            "out": room.reduce_tokens(
                operands["x"], sk.TokenGrid(*self.grid), sk.TokenReduction(*self.reduction), **options
            )
        }


KINDS = {"scan": ScanCase, "conv": ConvCase, "reduce": ReduceCase}  # by operation


class Draw:
    """Random values from a seed."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, dtype: torch.dtype, layout: str, *shape: int) -> Tensor:
        """Normal values that a tensor of this layout can hold: constant along a broadcast axis."""
        drawn = list(shape)
        if layout == "batch_broadcast":
            drawn[0] = 1
        elif layout == "time_broadcast":
            drawn[1] = 1
        return torch.randn(drawn, generator=self.generator).to(dtype).expand(shape).contiguous()

    def bounds(self, length: int) -> list[int]:
        """0 = b_0 <= ... <= b_n = length for up to four sequences, some of them empty."""
        return list(_bounds(int(self.generator.initial_seed()), length))


@cache
def _bounds(seed: int, length: int) -> tuple[int, ...]:
    inner = torch.randint(0, length + 1, (seed % 4,), generator=torch.Generator().manual_seed(length), device="cpu")
    return 0, *sorted(inner.tolist()), length


def lay_out(value: Tensor, layout: str) -> Tensor:
    """The same values in memory laid out otherwise."""
    if layout == "sliced":
        bigger = torch.full([side + 3 for side in value.shape], float("nan"), dtype=value.dtype, device=value.device)
        view = bigger[tuple(slice(1, 1 + side) for side in value.shape)]
        return view.copy_(value)
    if layout == "transposed":
        return value.transpose(1, -1).contiguous().transpose(1, -1)
    if layout == "batch_broadcast":
        return value[:1].expand(value.shape)
    if layout == "time_broadcast":
        return value[:, :1].expand(value.shape)
    return value


def simplest(case_type: type, **changes):
    """A small case with everything off, for tests that vary one thing."""
    base = {
        "seed": 0, "batch": 2, "length": 5, "grid": (5, 2, 3), "channels_per_group": 3, "groups": 1, "states": 4,
        "direction": "forward",
        "dtype": "float32", "dtype_delta": "float32", "dtype_state": "float32", "layout": "dense",
        "layout_state": "dense", "softplus": True,
        "D": False, "z": "none", "bias": False, "initial": False, "packed": False, "reduction": (1, 1, 1),
        "channels": 3, "width": 4,
        "silu": True, "residual": False,
    }  # fmt: skip
    names = {field.name for field in fields(case_type)}
    return case_type(**{name: value for name, value in (base | changes).items() if name in names})
