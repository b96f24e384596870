"""Progress of long work: a bar with time left on a terminal, a plain line now and then elsewhere.

Silent unless somebody asks: the command line wraps its work in ``with shown():``.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextvars import ContextVar
from typing import Any, TypeVar

from compress.errors import printable

T = TypeVar("T")

LINE_EVERY_S = 10.0  # seconds between two plain lines
SHORT_S = 1.0  # of work that is no part of other work, and leaves a line if it takes longer


class ProgressTask:
    """One piece of work; its progress is shown where somebody asked for it."""

    def advance(self, count: float = 1.0, note: str = "") -> None:
        """Count ``count`` more units as done; ``note`` is shown beside the bar."""


class _Lines(ProgressTask):
    """Plain lines on stderr, for logs: at most one every ``LINE_EVERY_S`` seconds, and the last."""

    def __init__(
        self, description: str, total: float | None, short_s: float, done: float = 0.0
    ) -> None:
        self.description, self.total, self.before, self.done = description, total, done, done
        self.short_s = short_s  # work that takes less leaves no line
        self.start = self.last = time.monotonic()

    def advance(self, count: float = 1.0, note: str = "") -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last >= LINE_EVERY_S:
            self.last = now
            self._print(now, note)

    def _print(self, now: float, note: str) -> None:
        spent = now - self.start
        of = ""
        if self.total:
            left = spent * (self.total - self.done) / max(self.done - self.before, 1e-9)
            of = f" of {_count(self.total)}, {left:.0f} s left"
        tail = f", {note}" if note else ""
        sys.stderr.write(f"{self.description}: {_count(self.done)}{of}{tail}\n")

    def finish(self) -> None:
        spent = time.monotonic() - self.start
        if spent >= self.short_s:
            sys.stderr.write(f"{self.description}: done in {spent:.1f} s\n")


def _count(value: float) -> str:
    """Return 3584000.0 as 3,584,000."""
    return f"{round(value, 2):,.12g}"


class _Bar(ProgressTask):
    def __init__(self, bars: Any, identity: Any) -> None:
        self.bars, self.identity = bars, identity

    def advance(self, count: float = 1.0, note: str = "") -> None:
        self.bars.update(self.identity, advance=count, note=note)


_bars: ContextVar[Any] = ContextVar("compress_progress", default=None)
_depth: ContextVar[int] = ContextVar("compress_progress_depth", default=0)


@contextlib.contextmanager
def show_progress() -> Iterator[None]:
    """Show the progress of everything inside on stderr."""
    with _terminal_bars() if sys.stderr.isatty() else contextlib.nullcontext("lines") as shown:
        token = _bars.set(shown)
        try:
            yield
        finally:
            _bars.reset(token)


def _terminal_bars() -> Any:
    from rich import progress as bars
    from rich.console import Console

    return bars.Progress(
        "{task.description}",
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        "left",
        bars.TimeRemainingColumn(),
        "{task.fields[note]}",
        console=Console(stderr=True),
    )


@contextlib.contextmanager
def task(
    description: str, total: float | None = None, *, done: float = 0.0
) -> Iterator[ProgressTask]:
    """Show one piece of work of ``total`` units while the block runs; yields its counter.

    ``done`` units were done before, by a run that was interrupted. Of work inside other work
    nothing is left to see once it is done, but that it took long.
    """
    bars, depth = _bars.get(), _depth.get()
    token = _depth.set(depth + 1)
    try:
        if bars is None:
            yield ProgressTask()
        elif bars == "lines":
            lines = _Lines(description, total, LINE_EVERY_S if depth else SHORT_S, done)
            yield lines
            lines.finish()
        else:
            bar = bars.add_task("  " * depth + description, total=total, completed=done, note="")
            yield _Bar(bars, bar)
            if depth:
                bars.remove_task(bar)
            elif total is None:
                bars.update(bar, total=1, completed=1)
    finally:
        _depth.reset(token)


def say(text: str, style: str = "dim") -> None:
    """Print a line on stderr, above the bars; silent unless asked."""
    bars = _bars.get()
    if bars == "lines":
        sys.stderr.write(f"{printable(text)}\n")
    elif bars is not None:
        bars.console.print(printable(text), style=style, markup=False)


def warn(text: str) -> None:
    """Say on stderr what is likely to be a mistake, above the bars; silent unless asked."""
    say(f"compress: warning: {text}", "yellow")


def stop() -> None:
    """Leave the bars as they stand: what is printed from now on comes below them."""
    bars = _bars.get()
    if bars not in (None, "lines"):
        bars.stop()


def track(items: Iterable[T], description: str, total: float | None = None) -> Iterator[T]:
    """Yield ``items`` one by one and show how far it got."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with task(description, total) as counter:
        for item in items:
            yield item
            counter.advance()
