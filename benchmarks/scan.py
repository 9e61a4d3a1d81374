"""The selective scan against its limit and its peers.

    python -m storm_benchmarks.scan --lengths 512,2048,8192 --dtypes float32,bfloat16 --modes forward,both \
        --out benchmarks/results/scan.json

Two ops: "scan", one direction with gate, D, bias and softplus; "bidirectional_scan", both
directions in one call, whole and reduced. Each with peers. The limit on a CPU is a loop of nothing
but exp2 and the two multiply-adds, in registers; elsewhere torch.exp2 and torch.addcmul over as
many elements. An item is one (channel, token, state) of one direction.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import Annotated

import torch
import typer
from torch import Tensor

import storm_kernels
from storm_kernels import Direction, TokenGrid, TokenReduction, reference

from . import harness, subject
from .peers import Contender, bidirectional_peers, peers
from .subject import Measurement

# Channels are independent of each other, so the check runs in float64 over the full length on this
# many of them.
CHECKED_CHANNELS = 48
TOKENS_PER_FRAME = 16
REDUCTION = TokenReduction(temporal_pool=4, temporal_stride=2)


@subject.timed(modes="forward,both")
def main(
    run: subject.Run,
    lengths: Annotated[str, typer.Option(help="Tokens, comma between.")] = "512,2048,8192",
    channels: Annotated[str, typer.Option(help="Channels E, comma between.")] = "1536",
    states: Annotated[str, typer.Option(help="States S.")] = "16",
    peer_length: Annotated[
        str,
        typer.Option(help="Longer sequences are timed without what loops over tokens: the reference and most peers."),
    ] = "2048",
) -> Iterator[Measurement]:
    """Time the selective scan."""
    (most,), (size,) = subject.numbers("peer-length", peer_length), subject.numbers("states", states)
    shapes = list(product(subject.numbers("channels", channels), subject.numbers("lengths", lengths)))
    for dtype in run.dtypes:
        for width, length in shapes:
            yield from measurements(length, width, size, dtype, run.device, run.modes, length <= most)


def operands(length: int, channels: int, states: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Inputs as a mixer makes them: delta about softplus(-4 +- 1), A = -1 ... -S."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    activations = {
        "u": normal(1, length, channels),
        "delta": normal(1, length, channels),
        "z": normal(1, length, channels),
    }
    activations |= {"B": normal(1, length, states), "C": normal(1, length, states)}
    A = -torch.arange(1.0, states + 1).expand(channels, states).contiguous()
    parameters = {"A": A, "D": torch.ones(channels), "delta_bias": normal(channels) - 4}
    return {name: t.to(device, dtype) for name, t in activations.items()} | {
        name: t.to(device) for name, t in parameters.items()
    }


def measurements(
    length: int, channels: int, states: int, dtype: torch.dtype, device: str, modes: list[str], loops: bool
) -> list[Measurement]:
    """The checked measurements of one shape: one direction in each mode, then both directions,
    whole and reduced, in each mode.
    """
    given = operands(length, channels, states, dtype, device)
    shape = f"batch=1 tokens={length} channels={channels} states={states}"
    made = _one_direction(given, shape, dtype, device, modes, loops)
    grid = TokenGrid(-(-length // TOKENS_PER_FRAME), 1, TOKENS_PER_FRAME)
    for reduction in (None, REDUCTION) if grid.tokens == length else (None,):
        made += _both_directions(given, shape, dtype, device, modes, loops, grid, reduction)
    return made


def _one_direction(
    given: dict, shape: str, dtype: torch.dtype, device: str, modes: list[str], loops: bool
) -> list[Measurement]:
    def ours(backend: str) -> Callable[..., Tensor]:
        return lambda **x: storm_kernels.selective_scan(**x, delta_softplus=True, backend=backend)

    def plain(**x: Tensor) -> Tensor:
        return reference.selective_scan(**x, delta_softplus=True)

    functions = {backend: ours(backend) for backend in subject.usable("scan", device, dtype)}
    return _in_modes(
        "scan", functions, plain, *peers(given, loops), given, shape, dtype, device, modes, loops, directions=1
    )


def _both_directions(
    given, shape, dtype, device, modes, loops, grid: TokenGrid, reduction: TokenReduction | None
) -> list[Measurement]:
    options = {"delta_softplus": True, "grid": grid if reduction else None, "reduction": reduction}

    def calling(scan: Callable, **more) -> Callable[..., Tensor]:
        def run(z, **one):
            return scan(Direction(**one), Direction(**one), z, **options, **more)

        return run

    ours, plain = storm_kernels.bidirectional_selective_scan, calling(reference.bidirectional_selective_scan)
    functions = {backend: calling(ours, backend=backend) for backend in subject.usable("scan", device, dtype)}
    rivals, notes = bidirectional_peers(
        given, loops, lambda out: reference.reduce_tokens(out, grid, reduction or TokenReduction())
    )
    if reduction:
        shape += f" pool={reduction.temporal_pool} stride={reduction.temporal_stride}"
    return _in_modes(
        "bidirectional_scan", functions, plain, rivals, notes, given, shape, dtype, device, modes, loops, directions=2
    )


def _in_modes(
    op, functions, plain, rivals, notes, given, shape, dtype, device, modes, loops, directions: int
) -> list[Measurement]:
    checked = _check(op, functions, rivals, plain, given)
    contenders = {
        name: Contender(call, given) for name, call in (functions | ({"torch": plain} if loops else {})).items()
    } | rivals
    notes = notes if loops else [*notes, "without the reference and the peers that loop over tokens at this length"]
    items = directions * given["u"].numel() * given["A"].shape[1]
    limit = _limit(items, device)
    made = []
    for mode in modes:
        some = {name: one for name, one in contenders.items() if mode == "forward" or not one.forward_only}
        calls = {name: subject.modes_of(one.call, one.inputs, [mode])[mode] for name, one in some.items()}
        made.append(Measurement(op, mode, shape, dtype, calls, checked, items, "items", limit, notes))
    return made


def _check(
    op: str, functions: dict, rivals: dict, plain: Callable[..., Tensor], given: dict[str, Tensor]
) -> dict[str, dict]:
    """Everyone's forward, and our gradient of u, against float64 on some channels over the full length."""
    channels = given["A"].shape[0]
    some = torch.linspace(0, channels - 1, min(CHECKED_CHANNELS, channels)).long().to(given["u"].device)
    narrow = {
        name: t if name in ("B", "C") else t[some] if name in ("A", "D", "delta_bias") else t[..., some]
        for name, t in given.items()
    }
    same, truth = plain(**narrow), plain(**{name: t.double() for name, t in narrow.items()})
    checked = {"torch": {"error": (same.double() - truth).square().mean().sqrt().item()}}
    checked |= {
        name: harness.verify(f"{op} on {name}", function(**given)[..., some], same, truth)
        for name, function in functions.items()
    }
    checked |= {
        name: subject.same_work(f"{op} of {name}", one.call(**one.inputs)[..., some], truth)
        for name, one in rivals.items()
    }
    gradients = [_gradient_of_u(plain, narrow, torch.float64), _gradient_of_u(plain, narrow, None)]
    for name, function in functions.items():
        whole = _gradient_of_u(function, given, None)[..., some]
        harness.verify(f"gradient of u by {op} on {name}", whole, gradients[1], gradients[0], gradient=True)
    return checked


def _gradient_of_u(function: Callable[..., Tensor], given: dict[str, Tensor], dtype: torch.dtype | None) -> Tensor:
    cast = {name: t.to(dtype) if dtype else t for name, t in given.items()}
    u = cast["u"].detach().clone().requires_grad_()
    out = function(**{**cast, "u": u})
    return torch.autograd.grad(out, u, torch.ones_like(out))[0]


def _limit(items: int, device: str) -> tuple[str, float | Callable[[], object]]:
    if device == "cpu" and storm_kernels.why_not("scan", "cpu") is None:
        return "exp2 and two multiply-adds in registers, forward", 1e3 * items / _exp2_fma_rate()
    # In pieces of 2^24 elements, so that any length fits; the time is that of all of them.
    piece = torch.rand(min(items, 2**24), device=device)

    def loop() -> None:
        for _ in range(max(1, items // 2**24)):
            torch.addcmul(piece, torch.exp2(piece), piece)

    return "torch.exp2, then torch.addcmul, over as many elements", loop


@cache
def _exp2_fma_rate() -> float:
    from storm_kernels.backends.cpu import exp2_fma_rate

    return exp2_fma_rate()


def cli(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """The command line -> its exit status; `subject.command`."""
    return subject.command(main, arguments, prog)


def test_scan(benchmark):
    """Collected by `pytest benchmarks --benchmark-only`."""
    one = measurements(512, 768, 16, torch.float32, "cpu", ["forward"], loops=False)[0]
    backend = next(iter(one.contenders))
    benchmark.extra_info.update(shape=one.shape, backend=backend, items=one.work, **one.checked[backend])
    benchmark(one.contenders[backend])


if __name__ == "__main__":
    sys.exit(cli())
