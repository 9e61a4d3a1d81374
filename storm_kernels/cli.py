"""``storm-kernels info [--json]``: which backend runs what here, and why. ``storm-kernels verify``:
that what runs is right.

``storm-kernels ask VIDEO QUESTION --model DIR`` answers a question about a video; ``build`` and
``convert`` make such a DIR out of published weights, ``encode`` writes the tokens of a folder's
videos. ``storm-kernels check FILE`` decodes a video whole and says what is wrong with it.
``storm-kernels profile`` times a video through the complete model, ``storm-kernels bench SUBJECT``
one operation.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from . import __version__, verify
from .backends import dispatch

# Of storm_benchmarks, which is imported when one of them is asked for.
SUBJECTS = ("scan", "conv", "reduce", "projector", "prefill", "decode")
EXTRAS = "storm-kernels[model,bench]"
# Commands of the other packages: the module whose cli() has the options, and a line of help.
_COMMANDS = {
    "ask": ("storm_model.ask", "a question about a video, to a model in a folder"),
    "build": ("storm_model.build", "a model's folder out of a SigLIP tower's and a language model's"),
    "convert": ("storm_model.convert", "a model's folder out of a VILA or NVILA folder"),
    "encode": ("storm_model.encode", "the tokens of every video in a folder, a file each"),
    "check": ("storm_model.check", "what is wrong with a video, all of it"),
    "profile": ("storm_benchmarks.e2e.__main__", "a video through the complete model, timed by stage"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: in place of the process's own, None for those.

    Returns:
        The exit code: 0; 1 when `verify` finds a result out of bounds or nobody reads the output to its end.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in _COMMANDS:
        return _of_package(f"storm-kernels {arguments[0]}", _COMMANDS[arguments[0]][0], arguments[1:])
    if arguments[:1] == ["bench"]:
        return _bench(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="storm-kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser(
        "info", help="one row for each operation and backend: available, chosen, reason, how to fix"
    )
    info.add_argument("--json", action="store_true", help="as JSON")
    commands.add_parser("verify", help="compare every available backend with the float64 reference, in under 30 s")
    for name, (_, line) in _COMMANDS.items():
        commands.add_parser(name, help=f"{line}: storm-kernels {name} --help")
    commands.add_parser(
        "bench",
        help=f"time {', '.join(SUBJECTS)} against limits and peers: storm-kernels bench scan --help",
    )
    options = parser.parse_args(arguments)
    try:
        code = _info(options.json) if options.command == "info" else _verify()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone, as `head` does: what is left in the buffer goes nowhere, so that the
        # interpreter's own flush at exit is silent too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def describe() -> dict[str, Any]:
    """The machine, and one row for each device, operation and backend: available, chosen, reason against it."""
    rows = []
    for device in verify.available_devices():
        for op in dispatch.OPS:
            order = dispatch.ORDER[device][op]
            reasons = {name: dispatch.why_not(op, name, device=device) for name in dispatch.BACKENDS}
            chosen = next((name for name in order if reasons[name] is None), None)
            for name, refused in reasons.items():
                reason = refused or ("" if name in order else f"runs only when asked for with backend={name!r}")
                row = {
                    "op": op,
                    "backend": name,
                    "device": device,
                    "available": refused is None,
                    "chosen": name == chosen,
                }
                rows.append(row | {"reason": reason})
    environment = {
        "storm_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    return {"environment": environment, "rows": rows}


def _info(as_json: bool) -> int:
    found = describe()
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    print(", ".join(f"{name} {value}" for name, value in found["environment"].items() if value is not None))
    print(f"\n{'op':<8}{'backend':<9}{'device':<8}{'available':<11}{'chosen':<8}reason and how to fix")
    for row in found["rows"]:
        available, chosen = ("yes" if row[name] else "no" for name in ("available", "chosen"))
        print(f"{row['op']:<8}{row['backend']:<9}{row['device']:<8}{available:<11}{chosen:<8}{row['reason']}")
    return 0


def _verify() -> int:
    start, failed = time.perf_counter(), 0
    groups: dict[tuple[str, str, str], list[str]] = {}
    for check in verify.run():
        failures = groups.setdefault((check.op, check.backend, check.device), [])
        if check.failure:
            failed += 1
            failures.append(f"{check.dtype}, {check.case}: {check.failure}")
    for (op, backend, device), failures in groups.items():
        print(f"{op:<8}{backend:<9}{device:<8}{'FAILED' if failures else 'ok'}")
        for failure in failures:
            print(f"    {failure}")
    print(
        f"{len(groups)} pairs of operation and backend against the float64 reference in "
        f"{time.perf_counter() - start:.1f} s, {failed} failures",
    )
    return 1 if failed else 0


def _bench(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="storm-kernels bench",
        description="Check and time one subject; `storm-kernels bench SUBJECT --help` has its options.",
    )
    parser.add_argument("subject", choices=SUBJECTS)
    subject = parser.parse_args(arguments[:1]).subject
    return _of_package(f"storm-kernels bench {subject}", f"storm_benchmarks.{subject}", arguments[1:])


def _of_package(prog: str, module: str, arguments: list[str]) -> int:
    """Hand the arguments to a module of storm_model or storm_benchmarks, whose packages need not be installed."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        print(f"error: {prog} needs {error.name}, which is not installed: pip install '{EXTRAS}'", file=sys.stderr)
        return 2
    return found.cli(arguments, prog)


if __name__ == "__main__":
    sys.exit(main())
