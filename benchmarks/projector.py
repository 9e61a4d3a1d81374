"""The temporal projector, reference and fused, against its own matrix products.

    python -m storm_benchmarks.projector --frames 32 --side 8 --width 768 --dtypes float32,bfloat16 \
        --out benchmarks/results/projector.json

The limit is the matrix products of the whole, unreduced projector and nothing else, done as the
fused projector does them: by torch, or through float32 where torch has no kernel for the dtype. A
fused projector with a reduction does fewer of them, so it may pass the limit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Annotated

import torch
import typer
from torch import Tensor

from storm_kernels import TemporalProjector, TokenGrid, TokenReduction
from storm_kernels.nn.linear import linear
from storm_kernels.reference import ReferenceTemporalProjector, reduce_tokens

from . import harness, subject
from .subject import Measurement

# Whole; the paper's temporal pooling with sampling; all three.
REDUCTIONS = (TokenReduction(), TokenReduction(4, 1, 2), TokenReduction(4, 2, 2))


@subject.timed(rounds=3)
def main(
    run: subject.Run,
    frames: Annotated[str, typer.Option(help="Frames, comma between.")] = "32",
    side: Annotated[str, typer.Option(help="Tokens a frame's side, after the 2x2 downsample.")] = "8",
    width: Annotated[str, typer.Option(help="Model width D.")] = "768",
    vision_width: Annotated[str, typer.Option(help="Width of the image tokens.")] = "256",
    layers: Annotated[str, typer.Option(help="Mixers.")] = "1",
) -> Iterator[Measurement]:
    """Time the temporal projector."""
    texts = {"side": side, "width": width, "vision-width": vision_width, "layers": layers}
    (edge,), (model_width,), (image_width,), (depth,) = (subject.numbers(name, text) for name, text in texts.items())
    counts = subject.numbers("frames", frames)
    for dtype in run.dtypes:
        for count in counts:
            grid = TokenGrid(count, edge, edge)
            yield from measurements(grid, model_width, image_width, depth, dtype, run.device, run.modes)


def measurements(
    grid: TokenGrid, width: int, vision_width: int, layers: int, dtype: torch.dtype, device: str, modes: list[str]
) -> list[Measurement]:
    """The checked measurements of one shape: each reduction in each mode."""
    torch.manual_seed(0)
    plain = ReferenceTemporalProjector(vision_width, width, layers, device=device, dtype=dtype).eval()
    fused = TemporalProjector(vision_width, width, layers, device=device, dtype=dtype).eval()
    fused.load_state_dict(plain.state_dict())
    features = torch.randn(1, grid.frames, 2 * grid.height, 2 * grid.width, vision_width, device=device).to(dtype)
    with torch.inference_mode():
        whole, truth = plain(features), _in_float64(plain, vision_width, width, layers, device)(features.double())
    products, operations = _products(plain, grid, dtype, device)
    shape = f"batch=1 frames={grid.frames} side={grid.height} width={width} vision_width={vision_width} layers={layers}"
    made = []
    for reduction in REDUCTIONS:
        same, right = (reduce_tokens(x, grid, reduction) for x in (whole, truth))
        with torch.inference_mode():
            result = fused(features, reduction)
        checked = {"fused": harness.verify(f"fused projector with {reduction}", result, same, right)}
        checked["reference"] = {"error": checked["fused"]["error_plain"]}
        counts = f"pool={reduction.temporal_pool} space={reduction.spatial_pool} stride={reduction.temporal_stride}"
        for mode in modes:
            calls = {
                "fused": _in_mode(fused, features, reduction, mode),
                "reference": _in_mode(plain, features, reduction, mode),
            }
            limit = ("the unreduced projector's matrix products, forward", products)
            made.append(
                Measurement("projector", mode, f"{shape} {counts}", dtype, calls, checked, operations, "FLOP", limit)
            )
    return made


def _in_mode(
    projector: ReferenceTemporalProjector, features: Tensor, reduction: TokenReduction, mode: str
) -> Callable[[], object]:
    def call(features: Tensor, **parameters: Tensor) -> Tensor:
        return torch.func.functional_call(projector, parameters, (features, reduction))

    if mode == "forward":
        return subject.modes_of(lambda features: projector(features, reduction), {"features": features}, [mode])[mode]
    return subject.modes_of(call, {"features": features, **dict(projector.named_parameters())}, [mode])[mode]


def _in_float64(
    plain: ReferenceTemporalProjector, vision_width: int, width: int, layers: int, device: str
) -> ReferenceTemporalProjector:
    double = ReferenceTemporalProjector(vision_width, width, layers, device=device, dtype=torch.float64).double()
    double.load_state_dict({name: t.double() for name, t in plain.state_dict().items()})
    return double.eval()


def _products(
    projector: ReferenceTemporalProjector, grid: TokenGrid, dtype: torch.dtype, device: str
) -> tuple[Callable[[], None], int]:
    """A call that does the projector's matrix products alone, on inputs of the right shapes, and their operations."""
    weights = [projector.proj.weight]
    for layer in projector.layers:
        mixer = layer.mixer
        weights += [
            mixer.in_proj.weight,
            mixer.x_proj.weight,
            mixer.x_proj_b.weight,
            mixer.dt_proj.weight,
            mixer.dt_proj_b.weight,
        ]
        weights.append(mixer.out_proj.weight)
    inputs = {
        weight.shape[1]: torch.randn(1, grid.tokens, weight.shape[1], device=device).to(dtype) for weight in weights
    }

    def products() -> None:
        with torch.inference_mode():
            for weight in weights:
                linear(inputs[weight.shape[1]], weight)

    return products, sum(2 * grid.tokens * weight.numel() for weight in weights)


def cli(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """The command line -> its exit status; `subject.command`."""
    return subject.command(main, arguments, prog)


def test_projector(benchmark):
    """Collected by `pytest benchmarks --benchmark-only`."""
    one = measurements(TokenGrid(8, 4, 4), 256, 64, 1, torch.float32, "cpu", ["forward"])[1]
    benchmark.extra_info.update(shape=one.shape, **one.checked["fused"])
    benchmark(one.contenders["fused"])


if __name__ == "__main__":
    sys.exit(cli())
