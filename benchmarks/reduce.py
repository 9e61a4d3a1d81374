"""Token reduction (temporal and spatial pooling, sampling) in one pass, against one read of the frames that survive.

python -m storm_benchmarks.reduce --frames 32,128 --side 16 --channels 768 --out
benchmarks/results/reduce.json
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Annotated

import torch
import typer
from torch import Tensor

import storm_kernels
from storm_kernels import TokenGrid, TokenReduction, reference

from . import harness, subject
from .subject import Measurement

# The paper's: temporal pooling; with sampling; with spatial pooling; all three.
REDUCTIONS = (TokenReduction(4), TokenReduction(4, 1, 2), TokenReduction(4, 2), TokenReduction(4, 2, 2))


@subject.timed()
def main(
    run: subject.Run,
    frames: Annotated[str, typer.Option(help="Frames, comma between.")] = "32,128",
    side: Annotated[str, typer.Option(help="Tokens a frame's side.")] = "16",
    channels: Annotated[str, typer.Option(help="Channels, comma between.")] = "768",
) -> Iterator[Measurement]:
    """Time the token reduction."""
    (edge,) = subject.numbers("side", side)
    shapes = list(product(subject.numbers("channels", channels), subject.numbers("frames", frames), REDUCTIONS))
    for dtype in run.dtypes:
        for width, count, reduction in shapes:
            yield from measurements(TokenGrid(count, edge, edge), width, reduction, dtype, run.device, run.modes)


def torch_mean(x: Tensor, grid: TokenGrid, reduction: TokenReduction) -> Tensor:
    """The same by PyTorch's mean over a view, of the frames that survive; for grids that the blocks divide."""
    k, p, s = reduction.temporal_pool, reduction.spatial_pool, reduction.temporal_stride
    blocks = x.view(x.shape[0], grid.frames // k, k, grid.height // p, p, grid.width // p, p, -1)
    return blocks[:, ::s].mean((2, 4, 6)).flatten(1, 3)


def measurements(
    grid: TokenGrid, channels: int, reduction: TokenReduction, dtype: torch.dtype, device: str, modes: list[str]
) -> list[Measurement]:
    """One checked measurement a mode."""
    x = torch.randn(1, grid.tokens, channels, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    ours = partial(storm_kernels.reduce_tokens, grid=grid, reduction=reduction)
    functions = {backend: partial(ours, backend=backend) for backend in subject.usable("reduce", device, dtype)}
    rivals = {"torch": partial(reference.reduce_tokens, grid=grid, reduction=reduction)}
    if grid.frames % reduction.temporal_pool == grid.height % reduction.spatial_pool == 0:
        rivals["torch mean"] = partial(torch_mean, grid=grid, reduction=reduction)
    same, truth = rivals["torch"](x), rivals["torch"](x.double())
    checked = {name: harness.verify(f"reduce on {name}", f(x), same, truth) for name, f in functions.items()}
    checked |= {name: subject.same_work(f"reduce of {name}", f(x), truth) for name, f in rivals.items()}
    survivors = x[:, : reduction.kept(grid).tokens].contiguous()
    limit = ("torch.sum over the surviving frames' tokens, forward", lambda: survivors.sum(1))
    counts = f"pool={reduction.temporal_pool} space={reduction.spatial_pool} stride={reduction.temporal_stride}"
    shape = f"batch=1 frames={grid.frames} side={grid.height} channels={channels} {counts}"
    made = []
    for mode in modes:
        calls = {name: subject.modes_of(f, {"x": x}, [mode])[mode] for name, f in (functions | rivals).items()}
        moved = survivors.numel() * x.element_size()
        made.append(Measurement("reduce", mode, shape, dtype, calls, checked, moved, "bytes", limit))
    return made


def cli(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """The command line -> its exit status; `subject.command`."""
    return subject.command(main, arguments, prog)


def test_reduce(benchmark):
    """Collected by `pytest benchmarks --benchmark-only`."""
    (one,) = measurements(TokenGrid(32, 8, 8), 768, REDUCTIONS[1], torch.float32, "cpu", ["forward"])
    backend = next(iter(one.contenders))
    benchmark.extra_info.update(shape=one.shape, backend=backend, bytes=one.work, **one.checked[backend])
    benchmark(one.contenders[backend])


if __name__ == "__main__":
    sys.exit(cli())
