"""The causal depthwise convolution with SiLU, both directions from one read of x, against copying the same bytes.

python -m storm_benchmarks.conv --lengths 2048,16384 --channels 1536 --out
benchmarks/results/conv.json
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

import storm_kernels
from storm_kernels import reference

from . import harness, subject
from .subject import Measurement

TAPS = 4
# The check runs in float64 on the whole of a sequence of at most this many tokens.
CHECKED_TOKENS = 2048


@subject.timed(modes="forward,both")
def main(
    run: subject.Run,
    lengths: Annotated[str, typer.Option(help="Tokens, comma between.")] = "2048,16384",
    channels: Annotated[str, typer.Option(help="Channels E, comma between.")] = "1536",
) -> Iterator[Measurement]:
    """Time the bidirectional causal convolution."""
    shapes = list(product(subject.numbers("channels", channels), subject.numbers("lengths", lengths)))
    for dtype in run.dtypes:
        for width, length in shapes:
            yield from measurements(length, width, dtype, run.device, run.modes)


def operands(length: int, channels: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "x": (1, length, channels),
        "weight": (channels, TAPS),
        "bias": (channels,),
        "weight_b": (channels, TAPS),
        "bias_b": (channels,),
    }
    made = {name: torch.randn(*shape, generator=draw) for name, shape in shapes.items()}
    return {name: t.to(device, dtype if name == "x" else None) for name, t in made.items()}


def torch_conv1d(x: Tensor, weight: Tensor, bias: Tensor, weight_b: Tensor, bias_b: Tensor) -> tuple[Tensor, Tensor]:
    """The same by PyTorch's own grouped convolution: padded left and right, one half of each kept."""
    length, inputs = x.shape[1], x.transpose(1, 2)

    def one(weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
        weight = (weight.flip(-1) if reverse else weight).to(x.dtype).unsqueeze(1)
        full = F.conv1d(inputs, weight, bias.to(x.dtype), padding=TAPS - 1, groups=weight.shape[0])
        return F.silu(full[..., TAPS - 1 :] if reverse else full[..., :length]).transpose(1, 2)

    return one(weight, bias, False), one(weight_b, bias_b, True)


def measurements(length: int, channels: int, dtype: torch.dtype, device: str, modes: list[str]) -> list[Measurement]:
    """One checked measurement a mode."""
    given = operands(length, channels, dtype, device)
    ours = partial(storm_kernels.bidirectional_causal_conv1d, activation="silu")
    functions = {backend: partial(ours, backend=backend) for backend in subject.usable("conv", device, dtype)}
    checked = _check(functions, {**given, "x": given["x"][:, :CHECKED_TOKENS]})
    functions["torch F.conv1d"] = torch_conv1d
    x, outs = given["x"], (torch.empty_like(given["x"]), torch.empty_like(given["x"]))

    def copies() -> None:
        for out in outs:
            out.copy_(x)

    shape, moved = f"batch=1 tokens={length} channels={channels} taps={TAPS}", 3 * x.numel() * x.element_size()
    limit = ("copying x twice, forward", copies)
    made = []
    for mode in modes:
        calls = {name: subject.modes_of(function, given, [mode])[mode] for name, function in functions.items()}
        made.append(Measurement("bidirectional_conv", mode, shape, dtype, calls, checked, moved, "bytes", limit))
    return made


def _check(functions: dict, given: dict[str, Tensor]) -> dict[str, dict]:
    def plain(cast: dict[str, Tensor]) -> Tensor:
        return torch.stack(reference.bidirectional_causal_conv1d(**cast, activation="silu"))

    same, truth = plain(given), plain({name: t.double() for name, t in given.items()})
    checked = {
        name: harness.verify(f"conv on {name}", torch.stack(f(**given)), same, truth) for name, f in functions.items()
    }
    return checked | {"torch F.conv1d": subject.same_work("torch F.conv1d", torch.stack(torch_conv1d(**given)), truth)}


def cli(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """The command line -> its exit status; `subject.command`."""
    return subject.command(main, arguments, prog)


def test_conv(benchmark):
    """Collected by `pytest benchmarks --benchmark-only`."""
    (one,) = measurements(2048, 768, torch.float32, "cpu", ["forward"])
    backend = next(iter(one.contenders))
    benchmark.extra_info.update(shape=one.shape, backend=backend, bytes=one.work, **one.checked[backend])
    benchmark(one.contenders[backend])


if __name__ == "__main__":
    sys.exit(cli())
