"""Which launches of the forward scan get tickets (src/tickets.cuh), and how their chains are cut into steps.

The estimate is arithmetic, no measurement. A multiprocessor with two or more chains at work goes at
full rate, with one alone at 0.7 of it (0.65 to 0.75, estimated): latencies show. A hand-over takes
a block some 4,000 cycles (fence, ticket, flag, states, first tile), in which it would have done 32
tokens beside another block. Time is sequential: no more chains can be at work than there are.

224 chains of 65,536 tokens, in units of one chain at full rate. On 108 multiprocessors 8 have three
blocks and the static launch lasts 3 where 2.07 would be balance; tickets of 2,048 tokens: 2.07,
hand-overs 0.03, the last items 0.03: 29 % less. Where two blocks fit on a multiprocessor (a
reduction), the last 8 chains run alone: 3.43 instead of 3. On 132 multiprocessors 92 have two
blocks and 40 one: 2; with tickets, 224 of 264 blocks at work, 224 / (92 + 40 x 0.7) = 1.87,
hand-overs 0.03, the last items 0.03: 4 % less.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

ALONE = 0.7
HAND_OVER = 32  # tokens
SKIP = 8  # tokens: a ticket past its chain's end
WORTH = 0.02  # of the static launch's time


class Work(NamedTuple):
    """Of one launch."""

    chains: int
    tokens: int  # of a chain, on average
    longest: int  # tokens that a chain may have
    step_tokens: int

    @property
    def steps(self) -> int:
        return -(-self.longest // self.step_tokens)


def step_tokens(tokens: int, interval: int, pool: int) -> int:
    """Tokens of a step for chains of ``tokens``: whole intervals between checkpoints of ``interval``
    tokens and, unless they are large, whole pools of ``pool`` tokens (0: none).

    With steps of W tokens, k blocks a multiprocessor lose k tokens / W hand-overs of HAND_OVER tokens
    and, at the end, half an item, k W / 2: the same at W = sqrt(64 tokens).
    """
    wanted = 8 * math.isqrt(tokens)
    whole = math.lcm(interval, pool or interval)
    unit = whole if whole <= 2 * wanted else interval
    return unit * max(1, round(wanted / unit))


def _time(chains: int) -> float:
    """Of so many whole chains together on a multiprocessor; 1: of a chain at full rate."""
    return chains / ALONE if chains == 1 else chains


def _static_time(chains: int, multiprocessors: int, resident: int) -> float:
    full, rest = divmod(chains, multiprocessors * resident)
    return full * _time(resident) + _time(-(-rest // multiprocessors))


def _ticketed_time(work: Work, multiprocessors: int, each: int) -> float:
    alone = max(
        0, 2 * multiprocessors - min(work.chains, each * multiprocessors)
    )  # multiprocessors with one chain at work
    items = work.chains * -(-work.tokens // work.step_tokens)
    tokens = work.chains * work.tokens + items * HAND_OVER + (work.chains * work.steps - items) * SKIP
    return (tokens / (multiprocessors - alone * (1 - ALONE)) + _time(each) * work.step_tokens / 2) / work.tokens


def ticketed_blocks(work: Work, multiprocessors: int, resident: Callable[[], int]) -> int:
    """Blocks of a launch with tickets, ``resident()`` of which fit on a multiprocessor; 0 if one
    block a chain is as good.
    """
    if work.chains <= multiprocessors or work.tokens == 0:
        return 0
    fit = resident()
    each = min(fit, max(2, work.chains // multiprocessors))  # no more than have work all the time, but two
    better = _ticketed_time(work, multiprocessors, each) < (1 - WORTH) * _static_time(work.chains, multiprocessors, fit)
    return each * multiprocessors if better else 0


def arguments(work: Work, device: torch.device | None) -> dict:
    """`Tickets` of src/tickets.cuh; static without a ``device``. A graph's replays zero the
    counters as the launch does.
    """
    if device is None:
        return {"next": None, "done": None, "chains": work.chains, "steps": 1, "step_tokens": work.longest}
    counters = torch.zeros(1 + work.chains, dtype=torch.int32, device=device)
    return {
        "next": counters[:1],
        "done": counters[1:],
        "chains": work.chains,
        "steps": work.steps,
        "step_tokens": work.step_tokens,
    }
