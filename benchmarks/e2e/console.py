"""What the main job prints: progress, tables, headlines. Nothing from a name is taken for markup."""

from __future__ import annotations

import sys
import time

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import figures, plot, summary, work

# Into a pipe or a log, the table gets the room it needs, spreads of three digits included; a terminal has its own
# width.
console = Console(width=None if sys.stdout.isatty() else 150)
# Seconds between two lines of progress into a pipe.
LINE_EVERY = 5.0


def say(line: str, style: str | None = None) -> None:
    """Print a line as it is."""
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def progress_of(operations: float) -> ProgressBar | ProgressLines:
    return (ProgressBar if console.is_terminal else ProgressLines)(operations)


class ProgressBar:
    """A `work.Progress` on the terminal, with the time that is left."""

    def __init__(self, operations: float):
        says = TextColumn("{task.description}", markup=False)
        columns = (
            SpinnerColumn(),
            says,
            BarColumn(),
            TextColumn("{task.percentage:.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
        )
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self._task = self._bar.add_task("", total=operations)

    def __enter__(self) -> work.Progress:
        self._bar.start()
        return work.Progress(
            says=lambda what: self._bar.update(self._task, description=what),
            did=lambda operations: self._bar.advance(self._task, operations),
        )

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()


class ProgressLines:
    """A `work.Progress` into a pipe or a file: a line for what begins, at most one in `LINE_EVERY` seconds."""

    def __init__(self, operations: float):
        self._all, self._done = operations, 0.0
        self._start, self._last = time.monotonic(), -LINE_EVERY

    def __enter__(self) -> work.Progress:
        return work.Progress(says=self._says, did=self._did)

    def __exit__(self, *exception: object) -> None:
        pass

    def _says(self, what: str) -> None:
        now = time.monotonic()
        if now - self._last >= LINE_EVERY:
            self._last = now
            say(f"[{100 * self._done / self._all:3.0f} %, {now - self._start:4.0f} s] {what}")
            console.file.flush()

    def _did(self, operations: float) -> None:
        self._done += operations


def show(rows: list[dict]) -> None:
    """The tables and the headlines of what is finished."""
    results, shared = summary.outcomes(rows), summary.clip_rows(rows)
    for frames, some in summary.by_frames(results).items():
        console.print(_table(frames, some, shared.get(frames, {})))
        if doubts := figures.doubts(some):
            say(f"{frames} frames, not reliable: {doubts}", style="red")
    if not results:
        return
    say(
        "TP, SP: temporal and spatial pooling; TS: temporal sampling. vs VILA: median of the rounds; ?: not reliable.",
    )
    for card in figures.cards(results):
        say(f"{card.name}: {card.figure} ({card.spread}), {card.from_to}. {card.note}")
        if card.not_reliable:
            say(f"    not reliable: {card.not_reliable}", style="bold red")


def _table(frames: int, results: list[summary.Outcome], shared: dict) -> Table:
    looped = ", looped clip" if results[0].row["looped"] else ""
    title = f"{frames} frames{looped}; milliseconds to the first token (before it: {figures.before(shared)})"
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE)
    for name in figures.TABLE_HEAD:
        table.add_column(name, no_wrap=True, justify="left" if name in ("variant", "projector") else "right")
    for one in results:
        table.add_row(*map(escape, figures.table_cells(results, one, plot.short_title(one))))
    return table
