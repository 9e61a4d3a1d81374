"""What the Triton kernels cost, read from the machine code compiled for a GPU that need not be there.

``python -m tools.kernel_mix [--target sm_90 ...] [--kernel scan] [--mix]`` prints one line for each
kernel and variant: registers, spilled bytes, instructions, and for scans on NVIDIA targets the
issue slots per item against the budget of `storm_kernels/backends/triton/configs.py`; with
``--mix`` also the instructions of each loop. It exits with 1 on a spill, on an atomic, or on a scan
over its budget. A *slot* is one instruction of one warp; an *item* is one (channel, token, state),
for each lane of that warp.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from storm_kernels.backends.triton import configs
from storm_kernels.backends.triton.launch import Launch
from storm_kernels.backends.triton.warm import conv_state_launch, model_launches
from storm_kernels.tokens import TokenGrid, TokenReduction

from . import sass

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32"}


@dataclass(frozen=True)
class Report:
    """One kernel compiled for one target."""

    name: str
    target: str
    registers: int
    spilled: int  # bytes
    instructions: int
    atomics: int
    loops: tuple[Counter[str], ...]  # the instructions of each loop, less those of its inner loops
    slots_per_item: float | None  # scans on NVIDIA targets
    budget: float | None

    @property
    def faults(self) -> list[str]:
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes")
        if self.atomics:
            found.append(f"{self.atomics} atomic instructions")
        if self.budget is not None and self.slots_per_item > self.budget:
            found.append(f"{self.slots_per_item:.2f} slots per item are over the budget of {self.budget}")
        return found

    def __str__(self) -> str:
        slots = "" if self.budget is None else f", {self.slots_per_item:.2f} slots/item (budget {self.budget})"
        faults = "".join(f"; FAULT: {fault}" for fault in self.faults)
        return (
            f"{self.target:7} {self.name}: {self.registers} registers, {self.spilled} B spilled, "
            f"{self.instructions} instructions{slots}{faults}"
        )


def variants(dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """Every kernel as the storm-7b projector launches it, both directions and one, whole and with
    either kind of reduction, and the one that only a given state needs; duplicates removed."""
    shape = {
        "d_model": 3584,
        "d_inner": 7168,
        "d_state": 16,
        "d_conv": 4,
        "grid": TokenGrid(32, 16, 16),
        "dtype": dtype,
    }
    launches = []
    for reduction in (TokenReduction(4), TokenReduction(4, 2), TokenReduction(4, 1, 2)):
        launches += model_launches(reduction=reduction, backward=True, **shape)
    launches += model_launches(reduction=None, bidirectional=False, backward=True, **shape)
    launches += model_launches(reduction=None, backward=False, **shape)
    launches.append(conv_state_launch(shape["d_inner"], shape["d_conv"], dtype))
    return list({name_of(one): one for one in launches}.values())


_REDUCED = {"none": "whole", "apart": "reduced", "any": "pooled", False: "whole", True: "reduced"}


def name_of(launch: Launch) -> str:
    options = launch.options
    words = [launch.kernel.__name__.removesuffix("_kernel")]
    if "GATE" in options:
        words += ["both directions" if len(launch.args[0]) == 2 else "one direction", _REDUCED[options["REDUCE"]]]
        if options["GATE"] == "kept":
            words[-1] = "sampled"
    if words[0] == "scan":
        words.append("with checkpoints" if launch.args[0][0][2] is not None else "without checkpoints")
    elif words[0] in ("conv", "conv_backward"):
        words.append(f"{len(launch.args[2])} filters")
    elif words[0] == "combine":
        scale, z = launch.args[1:3]
        words.append(
            f"{len(launch.args[0])} parts{', scaled' if scale is not None else ', gated' if z is not None else ''}"
        )
    return " ".join(words)


def source(launch: Launch) -> ASTSource:
    """The kernel with its arguments' types, specialised as at run time: ones are constants,
    multiples of 16 and pointers are known as such.
    """
    kernel, constants, attributes = launch.kernel, {}, {}
    values = dict(zip(kernel.arg_names, launch.args, strict=False)) | launch.options
    varying = {name if isinstance(name, str) else kernel.arg_names[name] for name in kernel.do_not_specialize or ()}

    def describe(path: tuple[int, ...], value, name: str, constexpr: bool):
        if isinstance(value, tuple) and not constexpr:
            return tuple(describe((*path, i), item, name, False) for i, item in enumerate(value))
        if isinstance(value, torch.Tensor):
            if value.data_ptr() % 16 == 0:
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
        parameter.name: describe((i,), values[parameter.name], parameter.name, parameter.is_constexpr)
        for i, parameter in enumerate(kernel.params)
    }
    return ASTSource(kernel, signature, constants, attributes)


def report(launch: Launch, target: str) -> Report:
    """Compile and read. On AMD registers and the memory of a lane, where spills go, come from the
    assembly's metadata.
    """
    wanted = {"num_warps", "num_stages", "enable_fp_fusion"} | ({"maxnreg"} if target != "gfx942" else set())
    compiled = compile(
        source(launch), target=TARGETS[target], options={k: v for k, v in launch.options.items() if k in wanted}
    )
    name, budget = name_of(launch), _budget(launch)
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        read = {
            key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "private_segment_fixed_size")
        }
        lines = re.findall(r"^\s+([a-z]\w+)", text, re.M)
        atomics = sum("atomic" in line for line in lines)
        return Report(
            name, target, read["vgpr_count"], read["private_segment_fixed_size"], len(lines), atomics, (), None, None
        )
    atomics = len(re.findall(r"^\s*(?:@!?%\w+ )?(?:atom|red)\.", compiled.asm["ptx"], re.M))
    cubin = compiled.asm["cubin"]
    (used,) = sass.resources(cubin).values()
    (instructions,) = sass.disassemble(cubin).values()
    loops = tuple(_mixes(sass.loops(instructions)))
    slots = None if budget is None else slots_per_item(launch, loops)
    return Report(
        name, target, used.registers, used.stack + used.local, len(instructions), atomics, loops, slots, budget
    )


def _mixes(loops: list[sass.Loop]) -> Iterator[Counter[str]]:
    for loop in loops:
        yield Counter(instruction.opcode.split(".")[0] for instruction in loop.own)
        yield from _mixes(loop.inner)


def _budget(launch: Launch) -> float | None:
    kernel = launch.kernel.__name__
    if kernel == "backward_kernel":
        return configs.SCAN_BACKWARD.budget
    if kernel == "scan_kernel":
        return configs.SCAN_FORWARD.budget
    return None


def slots_per_item(launch: Launch, loops: tuple[Counter[str], ...]) -> float:
    """Forward: the largest loop, of SEGMENT tokens. Backward: the largest, the adjoint, and the
    largest without shuffles, the recomputation.
    """
    options = launch.options
    items = options["SEGMENT"] * options["STATES"] * options["BLOCK_E"] / 32
    slots = max(loop.total() for loop in loops)
    if launch.kernel.__name__ == "backward_kernel":
        slots += max(loop.total() for loop in loops if loop["MUFU"] and not loop["SHFL"])
    return slots / items


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
                    print(
                        f"        loop of {loop.total()}: " + ", ".join(f"{n} {op}" for op, n in loop.most_common(16))
                    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
