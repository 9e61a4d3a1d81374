"""What the commands of this package have in common: bad input is one line, and what is being done is said."""

from __future__ import annotations

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


def say(line: str) -> None:
    """Show what is being done, beside the result: on standard error."""
    print(line, file=sys.stderr, flush=True)
