"""What the commands of this package have in common: options, one line for bad input, telling what is being done."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from transformers.utils import logging


def told(action: Callable[[], int]) -> int:
    """``action``'s exit status; 2 where the input was bad, told in one line on standard error; 130 for Ctrl-C."""
    logging.set_verbosity_error()
    try:
        return action()
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def add_reduction(parser: argparse.ArgumentParser, default: int | None, otherwise: str) -> None:
    """The options of the token reduction; ``otherwise`` says in the help what holds without them."""
    for name, what in (
        ("temporal-pool", "frames averaged"),
        ("spatial-pool", "tokens averaged a side"),
        ("temporal-stride", "every so many-th kept"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} ({otherwise})")


def say(line: str) -> None:
    """Show what is being done, beside the result: on standard error."""
    print(line, file=sys.stderr, flush=True)
