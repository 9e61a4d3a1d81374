"""What the benchmarks of single operations share: check the contenders, time them in turns, rate
them against a limit, print and record."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, NamedTuple, get_type_hints

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import storm_kernels

from . import environment, harness
from .harness import Row, Rows

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODES = ("forward", "backward", "both")
# Options that the commands share; their texts go to `begin`.
Dtypes = Annotated[str, typer.Option(help=", ".join(DTYPES))]
Modes = Annotated[str, typer.Option(help=", ".join(MODES))]
Device = Annotated[str | None, typer.Option(help="cpu, cuda; without it, a GPU if there is one.")]
Out = Annotated[Path | None, typer.Option(help="Append rows to this file.")]
# On a CPU, the backends that may run; on a GPU too. "torch" is the plain reference.
BACKENDS = ("cpu", "cuda", "triton")


@dataclass
class Measurement:
    """One shape in one mode. ``contenders`` maps a backend's or peer's name to the call that is
    timed; all do the same work."""

    op: str
    mode: str
    shape: str
    dtype: torch.dtype
    contenders: dict[str, Callable[[], object]]
    checked: dict[str, Row]  # name -> columns of the check that it has passed; who is not in it is not timed
    work: float
    unit: str  # of work: "items", "bytes", "FLOP"
    limit: tuple[str, float | Callable[[], object]]  # its name; its time in ms, or a call to time in the same turns
    notes: list[str] = field(default_factory=list)


def measure(what: Measurement, device: str, rows: Rows | None, rounds: int = 5) -> list[Row]:
    """Time, rate, record, print."""
    calls = {name: call for name, call in what.contenders.items() if name in what.checked}
    limit_name, limit = what.limit
    samples = harness.time_rounds(calls | ({"limit": limit} if callable(limit) else {}), device, rounds=rounds)
    limit_ms = harness.percentiles(samples.pop("limit"))[1] if callable(limit) else round(limit, 4)
    made = []
    for name, taken in samples.items():
        p50 = harness.percentiles(taken)[1]
        rated = {
            "work": what.work,
            "unit": what.unit,
            "rate": round(what.work / p50 * 1e3),
            "limit": limit_name,
            "limit_ms": limit_ms,
        }
        rated["of_limit"] = round(limit_ms / p50, 4)
        memory = harness.peak_memory(calls[name], device)
        made.append(
            harness.row(
                what.op,
                name,
                what.mode,
                what.shape,
                what.dtype,
                taken,
                device=device,
                **memory,
                **rated,
                **what.checked[name],
            )
        )
    if rows is not None:
        rows.append(*made)
    _print(what, made)
    return made


def modes_of(
    call: Callable[..., Tensor | tuple[Tensor, ...]], inputs: dict[str, Tensor], modes: Iterable[str]
) -> dict[str, Callable[[], object]]:
    """mode -> the call to time. "both" is forward, then backward to every input; "backward" is that
    without the forward."""

    def forward():
        with torch.inference_mode():
            return call(**inputs)

    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}

    def with_graph() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        out = call(**leaves)
        outs = out if isinstance(out, tuple) else (out,)
        return outs, tuple(torch.ones_like(one) for one in outs)

    def both():
        outs, grads = with_graph()
        return torch.autograd.grad(outs, list(leaves.values()), grads)

    calls = {"forward": forward, "both": both}
    if "backward" in modes:
        outs, grads = with_graph()
        calls["backward"] = lambda: torch.autograd.grad(outs, list(leaves.values()), grads, retain_graph=True)
    return {mode: calls[mode] for mode in modes}


def usable(op: str, device: str, dtype: torch.dtype) -> list[str]:
    """The backends that can run, after saying why the others cannot."""
    reasons = {name: storm_kernels.why_not(op, name, device=device, dtypes=(dtype,)) for name in BACKENDS}
    for name, reason in reasons.items():
        if reason is not None:
            _say_once(f"{op}: without {name}: {reason}")
    return [name for name, reason in reasons.items() if reason is None]


@cache
def _say_once(line: str) -> None:
    print(line)


def same_work(what: str, result: Tensor, truth: Tensor) -> Row:
    """A peer's check: the same function up to its own rounding. 5 % of the rms of the truth tells
    another function apart, and admits bfloat16."""
    error = (result.double() - truth).square().mean().sqrt().item()
    scale = truth.square().mean().sqrt().item()
    if not error <= 0.05 * scale:
        raise harness.CheckFailed(
            f"{what}: rms error {error:.3e} of a result whose rms is {scale:.3e}: it computes something else"
        )
    return {"error": error}


def numbers(option: str, text: str) -> list[int]:
    """ "512,2048" -> [512, 2048]; `typer.BadParameter` names what is wrong."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 1 <= int(part[:10]) <= 2**24 for part in parts):
        raise typer.BadParameter(f"--{option}: {text!r} is not a list of whole numbers from 1 to {2**24}")
    return [int(part) for part in parts]


def names(option: str, text: str, known: Iterable[str]) -> list[str]:
    """ "forward,both" -> its parts, each one of ``known``."""
    parts, known = [part.strip() for part in text.split(",")], list(known)
    for part in parts:
        if part not in known:
            raise typer.BadParameter(f"--{option}: {part!r} does not exist; there are: {', '.join(known)}")
    return parts


def open_rows(path: Path | None) -> Rows | None:
    """Rows appended to ``path``, which is checked before any long work; None records nothing."""
    try:
        return None if path is None else Rows(path)
    except OSError as error:
        raise typer.BadParameter(f"--out: cannot write {path}: {error.strerror}") from None
    except ValueError as error:
        raise typer.BadParameter(f"--out: {error}") from None


class Run(NamedTuple):
    """What the shared options ask for."""

    dtypes: list[torch.dtype]
    modes: list[str]
    device: str
    rows: Rows | None


def begin(dtypes: str, modes: str, device: str | None, out: Path | None) -> Run:
    """Read the shared options, and say where the command runs; `typer.BadParameter` names what is wrong."""
    kinds = [DTYPES[name] for name in names("dtypes", dtypes, DTYPES)]
    run = Run(kinds, names("modes", modes, MODES), device or default_device(), open_rows(out))
    say_environment(run.device)
    return run


def timed(
    dtypes: str = "float32,bfloat16", modes: str = "forward", rounds: int = 5
) -> Callable[[Callable[..., Iterator[Measurement]]], Callable[..., None]]:
    """A command of a function that takes a `Run` and options of its own and yields what is to be timed.

    The command has these options and the shared ones behind them; ``dtypes`` and ``modes`` are their defaults.
    """
    shared = {"dtypes": (Dtypes, dtypes), "modes": (Modes, modes), "device": (Device, None), "out": (Out, None)}

    def decorate(measurements: Callable[..., Iterator[Measurement]]) -> Callable[..., None]:
        @wraps(measurements)
        def main(*, dtypes: str, modes: str, device: str | None, out: Path | None, **options: str) -> None:
            run = begin(dtypes, modes, device, out)
            for what in measurements(run, **options):
                measure(what, run.device, run.rows, rounds=rounds)

        hints = get_type_hints(measurements, include_extras=True)
        own = [p.replace(annotation=hints[p.name]) for p in list(signature(measurements).parameters.values())[1:]]
        more = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for name, (kind, default) in shared.items()
        ]
        main.__signature__ = Signature([*own, *more])  # type: ignore[attr-defined]
        main.__annotations__ = {p.name: p.annotation for p in [*own, *more]}
        return main

    return decorate


def command(
    main: Callable[..., None],
    arguments: list[str] | None = None,
    prog: str | None = None,
    refusals: tuple[type[Exception], ...] = (),
) -> int:
    """Run ``main`` as a command line -> exit status, with one line where it is not 0.

    1: a failed check, or rows that cannot be written; 2: bad input; 130: Ctrl-C. Rows that were
    finished before are on disk.

    Args:
        arguments: what follows the command's name; None takes this process's.
        prog: the command's name in its help.
        refusals: further exceptions by which ``main`` says that its input is bad.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        return typer.main.get_command(app).main(arguments, prog_name=prog, standalone_mode=False) or 0
    except typer.BadParameter.__base__ as error:  # click's usage error, by whichever way typer got hold of click
        message, status = error.format_message(), 2
    except refusals as error:
        message, status = str(error), 2
    except harness.CheckFailed as error:
        message, status = f"a check failed, so nothing more is timed: {error}", 1
    except OSError as error:
        message, status = f"cannot write {error.filename}: {error.strerror}; what was written before is kept", 1
    except (KeyboardInterrupt, typer.Abort):
        message, status = "stopped; finished rows are kept", 130
    print(f"error: {message}", file=sys.stderr)
    return status


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def say_environment(device: str) -> None:
    print(
        f"{environment.device_name(device)}; {environment.versions()}; commit {environment.commit()}; "
        f"load {environment.load()}"
    )


def _print(what: Measurement, rows: list[Row]) -> None:
    dtype, (limit, limit_ms) = (
        str(what.dtype).removeprefix("torch."),
        (what.limit[0], rows[0]["limit_ms"] if rows else 0),
    )
    scale, per = ("G", 1e9) if max((row["rate"] for row in rows), default=0) >= 1e6 else ("", 1)
    table = Table(box=box.SIMPLE)
    for column in (
        "",
        "p20 ms",
        "p50 ms",
        "p80 ms",
        f"{scale}{what.unit}/s",
        "of limit",
        "peak MiB",
        "rms error",
        "times ours",
    ):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    ours = min(
        (row["p50_ms"] for row in rows if row["backend"] in (*BACKENDS, "fused", "patched", "storm_model")),
        default=None,
    )
    for row in rows:
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}"
        times = [f"{row[column]:,.3f}" for column in ("p20_ms", "p50_ms", "p80_ms")]
        rates = [
            f"{row['rate'] / per:,.3f}",
            f"{100 * row['of_limit']:.1f} %",
            peak,
            f"{row['error']:.1e}" if "error" in row else "-",
        ]
        table.add_row(row["backend"], *times, *rates, "-" if ours is None else f"{row['p50_ms'] / ours:,.1f}x")
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(f"{what.op} {what.mode}, {what.shape}, {dtype}", style="bold", highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"limit: {limit}, {limit_ms:,.3f} ms", highlight=False)
    for note in what.notes:
        console.print(note, highlight=False)
