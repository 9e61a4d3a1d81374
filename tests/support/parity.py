"""The bound that a backend has to keep on random cases of every operation (docs/reliability.md).

Truth is the reference in float64 on the same rounded inputs. The yardstick is the error of the
reference in the backend's own precision: a result passes when, over the whole, every token chunk
and every channel, its rms error is at most 1.25x (gradients 1.5x) and its largest error at most 2x
plus 2 ulp of the yardstick's. Few numbers can be lucky: where a group fails, the yardstick is taken
again as the reference's largest error over this and some neighbouring inputs, some per cent away,
whose rounding is another but whose conditioning is the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

import storm_kernels as sk
from storm_kernels import reference

from .approximate import ApproximateFunctions
from .parity_cases import ConvCase, Draw, lay_out

CHUNK = 16  # tokens in a group over which errors are taken
NEIGHBOURS = 16
DRAWS = 4  # yardsticks of a reference with approximate functions: an error drawn at random can be lucky too
# How far away a neighbour is. A convolution has no exponentials of sums to change its conditioning:
# far enough for its taps' partial sums to round in another binade, since which order of taps rounds
# less is a matter of luck that inputs a few per cent away share.
SPREAD = {ConvCase: 0.2}
# Numbers in a group under which only its largest error is judged: an rms of few, or of correlated,
# numbers varies by more than the bound.
FEW = 128


class Operations:
    """The public functions with one backend."""

    def __init__(self, backend: str):
        self.backend = backend

    def __getattr__(self, name: str) -> Callable:
        function = getattr(sk, name)
        return lambda *args, **options: function(*args, **options, backend=self.backend)


def check(case, backend: str, *, device: str = "cpu", gradients: bool = True, approximate: bool = False) -> None:
    """Raise AssertionError, naming the case and the result, unless ``backend`` keeps the bound.

    Args:
        approximate: the backend's functions err as far as a GPU's may; the yardsticks are then those
            of a reference whose functions do too.
    """
    operands = case.operands()
    laid_out = {name: lay_out(value.to(device), case.layout_of(name)) for name, value in operands.items()}
    got = evaluate(case, Operations(backend), laid_out, gradients)
    got = {name: value.cpu() for name, value in got.items()}
    truth = find_truth(case, operands, gradients)
    yardsticks = []
    for seed in range(DRAWS if approximate else 1):
        with ApproximateFunctions(seed) if approximate else contextlib.nullcontext():
            yardsticks.append(reference_errors(case, operands, truth, got, gradients))
    for name, value in got.items():
        assert value.shape == truth[name].shape, (
            f"{case}: {name} has shape {tuple(value.shape)}, expected {tuple(truth[name].shape)}"
        )
        expected = operands[name[5:]].dtype if name.startswith("grad_") else value.dtype
        assert value.dtype == expected, f"{case}: {name} has dtype {value.dtype}"
        assert torch.isfinite(value).all(), f"{case}: {name} is not finite"
        ratio = 1.5 if name.startswith("grad_") else 1.25
        error = (value.double() - truth[name]).abs()
        failed = exceeds(error, truth[name], [one[name] for one in yardsticks], ratio, value.dtype)
        while failed and not approximate and len(yardsticks) <= NEIGHBOURS:
            near = neighbour(case, operands, len(yardsticks))
            yardsticks.append(reference_errors(case, near, find_truth(case, near, gradients), got, gradients))
            failed = exceeds(error, truth[name], [one[name] for one in yardsticks], ratio, value.dtype)
        assert not failed, f"{case} on {backend}: {name}: {failed}"


def exceeds(
    error: Tensor, truth: Tensor, yardsticks: list[Tensor], ratio: float, dtype: torch.dtype, few: int = FEW
) -> str | None:
    """The first group of a result in ``dtype`` whose ``error`` is over the bound that the
    reference's errors ``yardsticks`` set, or None.
    """
    if error.numel() == 0:
        return None
    ulp, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    for kind, grouped in _groupings(truth.dim()):
        size, e = grouped(truth.abs()), grouped(error)
        bound = 2 * torch.stack([grouped(y).amax(-1) for y in yardsticks]).amax(0) + 2 * ulp * size.amax(-1) + tiny
        worst = (e.amax(-1) / bound).max()
        if worst > 1:
            return f"largest error over a {kind} is {worst:.3g} of its bound"
        if e.shape[-1] < few:
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
    """(batch, L, ...) -> (groups, elements): runs of CHUNK tokens, of which the last ends where the sequence does."""
    length = t.shape[1]
    starts = [*range(0, length - CHUNK + 1, CHUNK)]
    if length % CHUNK:
        starts.append(max(0, length - CHUNK))
    return torch.cat([t[:, start : start + CHUNK].flatten(1) for start in starts])


def evaluate(case, room, operands: dict[str, Tensor], gradients: bool) -> dict[str, Tensor]:
    leaves = {name: value.detach().requires_grad_(gradients) for name, value in operands.items()}
    results = case.call(room, leaves)
    if not gradients:
        return results
    draw = Draw(case.seed + 1)
    incoming = []
    for i, out in enumerate(results.values()):
        # A gradient that is one number for a whole axis arrives with stride zero, as from a sum.
        # Rounded to bfloat16 it is the same in every dtype.
        layout = ("dense", "time_broadcast", "transposed")[(case.seed + i) % 3]
        incoming.append(lay_out(draw.normal(torch.bfloat16, layout, *out.shape).to(out.device, out.dtype), layout))
    outs = [out for out in results.values() if out.requires_grad]
    incoming = [g for g, out in zip(incoming, results.values(), strict=True) if out.requires_grad]
    grads = torch.autograd.grad(outs, list(leaves.values()), incoming, allow_unused=True, materialize_grads=True)
    return {name: value.detach() for name, value in results.items()} | {
        f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)
    }


def find_truth(case, operands: dict[str, Tensor], gradients: bool) -> dict[str, Tensor]:
    return evaluate(case, reference, {name: value.double() for name, value in operands.items()}, gradients)


def reference_errors(
    case, operands: dict[str, Tensor], truth: dict[str, Tensor], like: dict[str, Tensor], gradients: bool
) -> dict[str, Tensor]:
    """How far the reference on these operands, rounded to the dtypes of ``like``, is from their truth."""
    plain = evaluate(case, reference, operands, gradients)
    return {name: (value.to(like[name].dtype).double() - truth[name]).abs() for name, value in plain.items()}


def neighbour(case, operands: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The operands, each value some per cent away (SPREAD); still constant along an axis that is broadcast."""
    draw = Draw(seed)
    moved = {}
    for name, value in operands.items():
        factor = 1 + SPREAD.get(type(case), 0.02) * draw.normal(torch.float32, case.layout_of(name), *value.shape)
        moved[name] = (value.float() * factor).to(value.dtype)
    return moved
