"""Debug a kernel without a GPU: run one small case of an operation in the PTX interpreter, and
follow one thread through it.

``python -m tests.support.ptx_on_cpu scan states=32 length=5`` runs the case (fields of
tests/support/parity_cases.py; the rest as small as can be) and says whether its results keep the
bound, or what was refused, where. ``--trace 0:64`` prints what thread 64 of block 0 executes:
source lines, instructions and what they write; ``--kernel`` and ``--lines 600-640`` cut that down.
``--backend triton``, ``--arch sm_80``, ``--backward``, ``--noise 1``.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
from pathlib import Path

import torch

from storm_kernels.backends.cuda import launcher, source

from ..parity import check
from ..parity_cases import KINDS, simplest
from . import Machine, OnPtx, Options, Refused
from .machine import ALWAYS
from .parser import Instruction


def source_line(place: tuple[str, int, int]) -> str:
    """The text of a line: of one of the CUDA sources with its headers put in, or of a Python file."""
    file, line = Path(place[0]), place[1]
    text = source.text(file.name) if file.suffix == ".cu" else file.read_text() if file.exists() else ""
    lines = text.splitlines()
    return lines[line - 1].strip() if 0 < line <= len(lines) else ""


class Trace:
    """Prints what one thread executes."""

    def __init__(self, block: int, thread: int, kernel: str, lines: range | None):
        self.block, self.thread, self.kernel, self.lines = block, thread, kernel, lines
        self._last: tuple | None = None

    def watch(self, machine: Machine) -> None:
        if self.kernel in ("", machine.kernel.name):
            machine.trace = self

    def __call__(self, machine: Machine, one: Instruction, mask) -> None:
        lanes = (machine.block_of == self.block) & (machine.thread_of == self.thread)
        if not (lanes if mask is ALWAYS else lanes & mask).any():
            return
        if self.lines is not None and (one.source is None or one.source[1] not in self.lines):
            return
        if one.source != self._last and one.source is not None:
            self._last = one.source
            print(f"{Path(one.source[0]).name}:{one.source[1]}  {source_line(one.source)}")
        lane = int(lanes.nonzero()[0][0])
        skipped = one.guard and not machine.registers.guard(one)[lane]
        print(f"    {one.text}" + ("    (not by this thread)" if skipped else self._values(machine, one, lane)))

    @staticmethod
    def _values(machine: Machine, one: Instruction, lane: int) -> str:
        names = [
            name
            for operand in one.operands[: 2 if one.parts[0] == "st" else 1]
            for name in operand.strip("[]{}").replace("|", ",").split(",")
        ]
        shown = []
        for name in (name.split("+")[0].strip() for name in names):
            if name.startswith("%") and name not in ("%tid.x", "%ctaid.x"):
                value = machine.registers.raw(name)[lane]
                shown.append(
                    f"{name} = {value:#x}" if value.dtype.kind == "u" and value.itemsize == 8 else f"{name} = {value}"
                )
                if value.dtype.kind == "u" and value.itemsize == 4 and one.parts[-1] in ("f32", "b32"):
                    shown[-1] += f" ({value.view('f4'):.8g})"
        return f"    {', '.join(shown)}" if shown else ""


def _case(op: str, changes: list[str]):
    fields = {}
    for change in changes:
        name, _, value = change.partition("=")
        try:
            fields[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[name] = value
    known = KINDS[op].__dataclass_fields__
    unknown = fields.keys() - known.keys()
    if unknown:
        raise SystemExit(f"{op} has no {', '.join(sorted(unknown))}: it has {', '.join(known)}")
    return simplest(KINDS[op], **fields)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.ptx_on_cpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("op", choices=KINDS)
    parser.add_argument("changes", nargs="*", metavar="field=value")
    parser.add_argument("--backend", choices=["cuda", "triton"], default="cuda", help="default: cuda")
    parser.add_argument("--arch", default="sm_90", help="sm_80, sm_90 (default) or sm_100")
    parser.add_argument("--backward", action="store_true", help="gradients too")
    parser.add_argument("--trace", metavar="BLOCK:THREAD")
    parser.add_argument("--kernel", default="", help="trace this kernel only")
    parser.add_argument("--lines", metavar="FIRST-LAST", help="trace these source lines only")
    parser.add_argument("--seed", type=int, default=0, help="of the order of blocks")
    parser.add_argument("--noise", type=int, help="a seed: approximate functions err as far as they may")
    args = parser.parse_args(arguments)
    torch.use_deterministic_algorithms(
        True, warn_only=True
    )  # tensors that nobody wrote are full of NaN, and known as such
    torch.set_num_threads(1)
    watch = None
    if args.trace:
        block, thread = map(int, args.trace.split(":"))
        lines = range(int(args.lines.split("-")[0]), int(args.lines.split("-")[-1]) + 1) if args.lines else None
        watch = Trace(block, thread, args.kernel, lines).watch
    case, options = _case(args.op, args.changes), Options(seed=args.seed, noise=args.noise)
    try:
        if args.backend == "cuda":
            with launcher.using(OnPtx(args.arch, options, watch=watch)):
                check(case, args.backend, gradients=args.backward)
        else:
            from .triton import triton_on_ptx

            with triton_on_ptx(args.arch, options, watch=watch):
                check(case, args.backend, gradients=args.backward)
    except (Refused, AssertionError) as error:
        print(error)
        return 1
    print(f"{case} on {args.backend}: fine")
    return 0


if __name__ == "__main__":
    try:
        code = main()
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
