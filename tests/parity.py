"""Random cases of every operation, and the bound that a backend has to keep on them (RELIABILITY.md).

Truth is the reference in float64 on the same rounded inputs. The yardstick is the error of the reference in the backend's own precision: a result
passes when, over the whole, every token chunk and every channel, its rms error is at most 1.25x (gradients 1.5x) and its largest error at most
2x plus 2 ulp of the yardstick's. Few numbers can be lucky: where a group fails, the yardstick is taken again as the reference's largest error over
this and some neighbouring inputs, a few per cent away, whose rounding is another but whose conditioning is the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from hypothesis import strategies as st
from torch import Tensor

import storm_kernels as sk
from storm_kernels import reference

LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 11, 13, 15, 16, 17, 23, 31, 32, 33, 63, 64, 65, 67)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = ("dense", "sliced", "transposed", "batch_broadcast", "time_broadcast")
CHUNK = 16  # tokens in a group over which errors are taken
NEIGHBOURS = 16
FEW = 128  # numbers in a group under which only its largest error is judged: an rms of few, or of correlated, numbers varies by more than the bound

dtypes = st.sampled_from(sorted(DTYPES))
layouts = st.sampled_from(("dense", *LAYOUTS))
seeds = st.integers(0, 2**31 - 1)


def fuzz_cases(default: int) -> int:
    """How many random cases a test draws: STORM_KERNELS_FUZZ times ``default``."""
    return max(1, int(default * float(os.environ.get("STORM_KERNELS_FUZZ", "1"))))


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
        options |= {"initial_state": t.get("initial_state"), "return_final_state": True, "reverse": self.direction == "reverse"}
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
            outs = room.bidirectional_causal_conv1d(t["x"], t["weight"], t.get("bias"), t["weight_b"], t.get("bias_b"), **options)
            return dict(zip(("out", "out_b"), outs, strict=True))
        options |= {"initial_state": t.get("initial_state"), "return_final_state": True, "reverse": self.direction == "reverse"}
        return dict(zip(("out", "final_state"), room.causal_conv1d(t["x"], t["weight"], t.get("bias"), **options), strict=True))


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
        return {"out": room.reduce_tokens(operands["x"], sk.TokenGrid(*self.grid), sk.TokenReduction(*self.reduction), **options)}


@dataclass(frozen=True)
class NormCase:
    """One call of residual_layer_norm."""

    seed: int
    batch: int
    length: int
    channels: int
    dtype: str
    layout: str
    residual: bool
    bias: bool

    def operands(self) -> dict[str, Tensor]:
        draw, dtype = Draw(self.seed), DTYPES[self.dtype]
        found = {"x": draw.normal(dtype, self.layout, self.batch, self.length, self.channels)}
        if self.residual:
            found["residual"] = draw.normal(dtype, self.layout, self.batch, self.length, self.channels)
        found["weight"] = draw.normal(torch.float32, "dense", self.channels)
        if self.bias:
            found["bias"] = draw.normal(torch.float32, "dense", self.channels)
        return found

    def layout_of(self, name: str) -> str:
        return self.layout if name in ("x", "residual") else "dense"

    def call(self, room, operands: dict[str, Tensor], **options) -> dict[str, Tensor]:
        t = operands
        # the sum is rounded to x's dtype before it is normalised: so is the truth's
        outs = room.residual_layer_norm(t["x"], t.get("residual"), t["weight"], t.get("bias"), 1e-5, **options)
        return dict(zip(("normed", "summed"), outs, strict=True))


directions = st.sampled_from(("forward", "reverse", "both", "both"))
reductions = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
grids = st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))

scan_cases = st.builds(
    ScanCase,
    seed=seeds,
    batch=st.integers(1, 3),
    length=st.sampled_from(LENGTHS),
    grid=grids,
    channels_per_group=st.sampled_from((1, 2, 3, 5, 8, 16, 17, 33)),
    groups=st.sampled_from((1, 1, 1, 2, 3)),
    states=st.sampled_from((16, 16, 16, 1, 2, 5, 8, 32)),
    direction=directions,
    dtype=dtypes,
    dtype_delta=dtypes,
    dtype_state=dtypes,
    layout=layouts,
    layout_state=layouts,
    softplus=st.booleans(),
    D=st.booleans(),
    z=st.sampled_from(("none", "all", "kept")),
    bias=st.booleans(),
    initial=st.booleans(),
    packed=st.sampled_from((False, False, True)),
    reduction=st.one_of(st.just((1, 1, 1)), reductions, reductions),
)
conv_cases = st.builds(
    ConvCase,
    seed=seeds,
    batch=st.integers(1, 3),
    length=st.sampled_from(LENGTHS),
    channels=st.sampled_from((1, 3, 8, 16, 17, 40)),
    width=st.sampled_from((4, 4, 4, 1, 2, 3)),
    direction=directions,
    dtype=dtypes,
    layout=layouts,
    silu=st.booleans(),
    bias=st.booleans(),
    initial=st.booleans(),
    packed=st.sampled_from((False, False, True)),
)
reduce_cases = st.builds(
    ReduceCase,
    seed=seeds,
    batch=st.integers(1, 3),
    grid=grids,
    channels=st.sampled_from((1, 3, 8, 17, 64)),
    dtype=dtypes,
    layout=layouts,
    reduction=reductions,
)
norm_cases = st.builds(
    NormCase,
    seed=seeds,
    batch=st.integers(1, 2),
    length=st.sampled_from(LENGTHS),
    channels=st.sampled_from((2, 3, 8, 17, 64, 130)),
    dtype=dtypes,
    layout=layouts,
    residual=st.booleans(),
    bias=st.booleans(),
)
CASES = {"scan": scan_cases, "conv": conv_cases, "reduce": reduce_cases, "norm": norm_cases}


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
        inner = torch.randint(0, length + 1, (int(self.generator.initial_seed()) % 4,), generator=torch.Generator().manual_seed(length))
        return [0, *sorted(inner.tolist()), length]


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


class _Operations:
    """The public functions with one backend."""

    def __init__(self, backend: str):
        self.backend = backend

    def __getattr__(self, name: str) -> Callable:
        function = getattr(sk, name)
        return lambda *args, **options: function(*args, **options, backend=self.backend)


def check(case, backend: str, *, device: str = "cpu", gradients: bool = True) -> None:
    """Raise AssertionError, naming the case and the result, unless ``backend`` keeps the bound."""
    operands = case.operands()
    laid_out = {name: lay_out(value.to(device), case.layout_of(name)) for name, value in operands.items()}
    got = _evaluate(case, _Operations(backend), laid_out, gradients)
    got = {name: value.cpu() for name, value in got.items()}
    truth = _truth(case, operands, gradients)
    yardsticks = [_errors(case, operands, truth, got, gradients)]
    for name, value in got.items():
        assert value.shape == truth[name].shape, f"{case}: {name} has shape {tuple(value.shape)}, expected {tuple(truth[name].shape)}"
        expected = operands[name[5:]].dtype if name.startswith("grad_") else value.dtype
        assert value.dtype == expected, f"{case}: {name} has dtype {value.dtype}"
        assert torch.isfinite(value).all(), f"{case}: {name} is not finite"
        ratio = 1.5 if name.startswith("grad_") else 1.25
        failed = exceeds(value, truth[name], [one[name] for one in yardsticks], ratio)
        while failed and len(yardsticks) <= NEIGHBOURS:
            near = _neighbour(case, operands, len(yardsticks))
            yardsticks.append(_errors(case, near, _truth(case, near, gradients), got, gradients))
            failed = exceeds(value, truth[name], [one[name] for one in yardsticks], ratio)
        assert not failed, f"{case} on {backend}: {name}: {failed}"


def exceeds(value: Tensor, truth: Tensor, yardsticks: list[Tensor], ratio: float) -> str | None:
    """The first group whose error is over the bound that the reference's errors ``yardsticks`` set, or None."""
    if value.numel() == 0:
        return None
    ulp, tiny = torch.finfo(value.dtype).eps, torch.finfo(value.dtype).tiny
    error = (value.double() - truth).abs()
    for kind, grouped in _groupings(truth.dim()):
        size, e = grouped(truth.abs()), grouped(error)
        bound = 2 * torch.stack([grouped(y).amax(-1) for y in yardsticks]).amax(0) + 2 * ulp * size.amax(-1) + tiny
        worst = (e.amax(-1) / bound).max()
        if worst > 1:
            return f"largest error over a {kind} is {worst:.3g} of its bound"
        if e.shape[-1] < FEW:
            continue
        rms = torch.stack([grouped(y).square().mean(-1).sqrt() for y in yardsticks]).amax(0)
        # Half an ulp of the group's size is the rounding of the result alone.
        bound = ratio * rms + 0.5 * ulp * size.square().mean(-1).sqrt() + tiny
        worst = (e.square().mean(-1).sqrt() / bound).max()
        if worst > 1:
            return f"rms error over a {kind} is {worst:.3g} of its bound"
    return None


def _groupings(dims: int) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    """Ways to cut a result into rows whose errors are judged together."""
    whole = ("whole", lambda t: t.reshape(1, -1))
    if dims < 3:
        return [whole, ("row", lambda t: t.reshape(t.shape[0] if t.dim() == 2 else 1, -1))]
    by_channel = ("channel", lambda t: t.movedim(-1, 0).flatten(1))
    return [whole, ("token chunk", _chunks), by_channel]


def _chunks(t: Tensor) -> Tensor:
    """(batch, L, ...) -> (groups, elements): runs of CHUNK tokens, the last one padded with the first of its own values."""
    missing = -t.shape[1] % CHUNK
    padded = torch.cat([t, t[:, -1:].expand(-1, missing, *t.shape[2:])], 1) if missing else t
    return padded.unflatten(1, (-1, CHUNK)).flatten(0, 1).flatten(1)


def _evaluate(case, room, operands: dict[str, Tensor], gradients: bool) -> dict[str, Tensor]:
    leaves = {name: value.detach().requires_grad_(gradients) for name, value in operands.items()}
    results = case.call(room, leaves)
    if not gradients:
        return results
    draw = Draw(case.seed + 1)
    incoming = []
    for i, out in enumerate(results.values()):
        # A gradient that is one number for a whole axis arrives with stride zero, as from a sum. Rounded to bfloat16 it is the same in every dtype.
        layout = ("dense", "time_broadcast", "transposed")[(case.seed + i) % 3]
        incoming.append(lay_out(draw.normal(torch.bfloat16, layout, *out.shape).to(out.device, out.dtype), layout))
    outs = [out for out in results.values() if out.requires_grad]
    incoming = [g for g, out in zip(incoming, results.values(), strict=True) if out.requires_grad]
    grads = torch.autograd.grad(outs, list(leaves.values()), incoming, allow_unused=True, materialize_grads=True)
    return {name: value.detach() for name, value in results.items()} | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def _truth(case, operands: dict[str, Tensor], gradients: bool) -> dict[str, Tensor]:
    return _evaluate(case, reference, {name: value.double() for name, value in operands.items()}, gradients)


def _errors(case, operands: dict[str, Tensor], truth: dict[str, Tensor], like: dict[str, Tensor], gradients: bool) -> dict[str, Tensor]:
    """How far the reference on these operands, rounded to the dtypes of ``like``, is from their truth."""
    plain = _evaluate(case, reference, operands, gradients)
    return {name: (value.to(like[name].dtype).double() - truth[name]).abs() for name, value in plain.items()}


def _neighbour(case, operands: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The operands, each value a few per cent away; still constant along an axis that is broadcast."""
    draw = Draw(seed)
    moved = {}
    for name, value in operands.items():
        factor = 1 + 0.02 * draw.normal(torch.float32, case.layout_of(name), *value.shape)
        moved[name] = (value.float() * factor).to(value.dtype)
    return moved


def simplest(case_type: type, **changes):
    """A small case with everything off, for tests that vary one thing."""
    base = {
        "seed": 0, "batch": 2, "length": 5, "grid": (5, 2, 3), "channels_per_group": 3, "groups": 1, "states": 4, "direction": "forward",
        "dtype": "float32", "dtype_delta": "float32", "dtype_state": "float32", "layout": "dense", "layout_state": "dense", "softplus": True,
        "D": False, "z": "none", "bias": False, "initial": False, "packed": False, "reduction": (1, 1, 1), "channels": 3, "width": 4,
        "silu": True, "residual": False,
    }  # fmt: skip
    names = {field.name for field in fields(case_type)}
    return case_type(**{name: value for name, value in (base | changes).items() if name in names})
