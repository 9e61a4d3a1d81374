"""What the Triton kernels cost, read from the machine code compiled for a GPU that need not be there.

``python -m tools.kernel_mix [--target sm_90 ...] [--kernel scan] [--mix]`` prints one line for each kernel and variant: registers, spilled bytes,
instructions, and for scans the issue slots per item against the budget of `storm_kernels/triton/configs.py`; with ``--mix`` also the instructions of
each loop. It exits with 1 on a spill, on an atomic, or on a scan over its budget (budgets are for sm_90; other targets have other instructions).
A *slot* is one instruction of one warp; an *item* is one (channel, token, state), for each lane of that warp.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from storm_kernels.tokens import TokenGrid, TokenReduction
from storm_kernels.triton import configs
from storm_kernels.triton.launch import Launch
from storm_kernels.triton.warm import model_launches

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32"}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Loop:
    """A loop of the machine code without its inner loops."""

    instructions: Counter[str]

    @property
    def slots(self) -> int:
        return self.instructions.total()


@dataclass(frozen=True)
class Report:
    """One kernel compiled for one target."""

    name: str
    target: str
    registers: int
    spilled: int  # bytes
    instructions: int
    atomics: int
    loops: tuple[Loop, ...]
    slots_per_item: float | None  # scans on NVIDIA targets
    budget: float | None

    @property
    def faults(self) -> list[str]:
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes")
        if self.atomics:
            found.append(f"{self.atomics} atomic instructions")
        if self.target == "sm_90" and self.budget is not None and self.slots_per_item > self.budget:
            found.append(f"{self.slots_per_item:.2f} slots per item are over the budget of {self.budget}")
        return found

    def __str__(self) -> str:
        slots = "" if self.slots_per_item is None else f", {self.slots_per_item:.2f} slots/item (budget {self.budget})"
        faults = "".join(f"; FAULT: {fault}" for fault in self.faults)
        return f"{self.target:7} {self.name}: {self.registers} registers, {self.spilled} B spilled, {self.instructions} instructions{slots}{faults}"


def variants(dtype: torch.dtype = torch.bfloat16, backward: bool = True) -> list[Launch]:
    """Every kernel as the storm-7b projector launches it, without and with reduction, one and both directions; duplicates removed."""
    shape = {"d_model": 3584, "d_inner": 7168, "d_state": 16, "d_conv": 4, "grid": TokenGrid(32, 16, 16), "dtype": dtype, "backward": backward}
    launches = model_launches(reduction=TokenReduction(4, 1, 2), **shape)
    launches += model_launches(reduction=None, bidirectional=False, **shape)
    return list({name_of(one): one for one in launches}.values())


def name_of(launch: Launch) -> str:
    options = launch.options
    words = [launch.kernel.__name__.removesuffix("_kernel")]
    if "GATE" in options:
        words += ["both directions" if len(launch.args[0]) == 2 else "one direction", "reduced" if options["REDUCE"] else "whole"]
    if words[0] == "scan":
        words.append("with checkpoints" if launch.args[0][0][-1] is not None else "without checkpoints")
    elif words[0].startswith("conv"):
        words.append(f"{len(launch.args[2])} filters")
    elif words[0] == "combine":
        scale, z = launch.args[1:3]
        words.append(f"{len(launch.args[0])} parts{', scaled' if scale is not None else ', gated' if z is not None else ''}")
    return " ".join(words)


def source(launch: Launch) -> ASTSource:
    """The kernel with its arguments' types, specialised as at run time: ones are constants, multiples of 16 and pointers are known as such."""
    kernel, constants, attributes = launch.kernel, {}, {}
    values = dict(zip(kernel.arg_names, launch.args, strict=False)) | launch.options
    varying = {name if isinstance(name, str) else kernel.arg_names[name] for name in kernel.do_not_specialize or ()}

    def describe(path: tuple[int, ...], value, name: str, constexpr: bool):
        if isinstance(value, tuple) and not constexpr:
            return tuple(describe((*path, i), item, name, False) for i, item in enumerate(value))
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return f"*{TYPES[value.dtype]}"
        if constexpr or value is None or (value == 1 and name not in varying):
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0 and name not in varying:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    signature = {
        parameter.name: describe((i,), values[parameter.name], parameter.name, parameter.is_constexpr) for i, parameter in enumerate(kernel.params)
    }
    return ASTSource(kernel, signature, constants, attributes)


def report(launch: Launch, target: str) -> Report:
    """Compile and read. On AMD registers and the memory of a lane, where spills go, come from the assembly's metadata."""
    wanted = {"num_warps", "num_stages", "enable_fp_fusion"} | ({"maxnreg"} if target != "gfx942" else set())
    compiled = triton.compile(source(launch), target=TARGETS[target], options={k: v for k, v in launch.options.items() if k in wanted})
    name, budget = name_of(launch), _budget(launch)
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        read = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "private_segment_fixed_size")}
        lines = re.findall(r"^\s+([a-z]\w+)", text, re.M)
        atomics = sum("atomic" in line for line in lines)
        return Report(name, target, read["vgpr_count"], read["private_segment_fixed_size"], len(lines), atomics, (), None, None)
    atomics = len(re.findall(r"^\s*(?:@!?%\w+ )?(?:atom|red)\.", compiled.asm["ptx"], re.M))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", path)
        code = _run("nvdisasm", "-c", path)
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    instructions, loops = parse(code)
    slots = None if budget is None else slots_per_item(launch, loops)
    return Report(name, target, registers, stack + local, len(instructions), atomics, tuple(loops), slots, budget)


def _run(tool: str, *arguments) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _budget(launch: Launch) -> float | None:
    kernel = launch.kernel.__name__
    if kernel == "backward_kernel":
        return configs.SCAN_BACKWARD.budget
    if kernel == "scan_kernel":
        return configs.REDUCED_BUDGET if launch.options["REDUCE"] else configs.SCAN_FORWARD.budget
    return None


def parse(code: str) -> tuple[list[str], list[Loop]]:
    """Opcodes of an nvdisasm listing, and its loops: from a backward branch's target to the branch, less the loops inside."""
    labels, opcodes, branches = {}, [], []
    for line in code.splitlines():
        if label := re.match(r"\.(L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            if target := re.search(r"\.(L_x_\d+)", found[2]):
                branches.append((len(opcodes), target[1]))
            opcodes.append(found[1].split(".")[0])
    # the jump to itself at the end of a kernel is padding
    spans = [(labels[target], at) for at, target in branches if labels.get(target, at) < at]
    loops = []
    for begin, end in spans:
        inside = {i for b, e in spans if begin <= b and e <= end and (b, e) != (begin, end) for i in range(b, e + 1)}
        loops.append(Loop(Counter(opcodes[i] for i in range(begin, end + 1) if i not in inside)))
    return opcodes, loops


def slots_per_item(launch: Launch, loops: list[Loop]) -> float:
    """Forward: the largest loop, of GROUP tokens. Backward: the largest, the adjoint, and the largest without shuffles, the recomputation."""
    options = launch.options
    items = options["GROUP"] * options["STATES"] * options["BLOCK_E"] / 32
    adjoint = max(loops, key=lambda loop: loop.slots).slots
    if launch.kernel.__name__ == "scan_kernel":
        return adjoint / items
    recomputed = max((loop for loop in loops if not loop.instructions["SHFL"] and loop.instructions["MUFU"]), key=lambda loop: loop.slots)
    return (adjoint + recomputed.slots) / items


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.kernel_mix", description=__doc__.split("\n\n")[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--kernel", default="", help="only kernels whose name starts so")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--mix", action="store_true", help="print the instructions of each loop")
    args = parser.parse_args(arguments)
    faults = 0
    for target in args.target or TARGETS:
        for launch in variants(getattr(torch, args.dtype)):
            if name_of(launch).startswith(args.kernel):
                result = report(launch, target)
                faults += len(result.faults)
                print(result, flush=True)
                for loop in result.loops if args.mix else ():
                    print(f"        loop of {loop.slots}: " + ", ".join(f"{n} {op}" for op, n in loop.instructions.most_common(16)))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
