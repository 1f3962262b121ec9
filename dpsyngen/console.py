"""What a person sees while the tool works: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class Console:
    """Lines and progress on standard error and standard output.

    Args:
        quiet: only results, errors and a line for each phase.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.live = sys.stderr.isatty() and not quiet

    def line(self, text: str = "") -> None:
        """A line that belongs to the result."""
        print(text, flush=True)

    def note(self, text: str) -> None:
        """A line about what is going on."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def progress(self, title: str, total: int, unit: str, start: int = 0) -> Progress:
        """Progress of `total` units of work, `start` of which were done before."""
        return _Bar(title, total, unit, start) if self.live else Progress(title, total, unit, start, self.quiet)


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


class Progress:
    """Plain lines: at the start, every ten seconds and at the end; a context manager.

    Args:
        title: what is being done.
        total: units of work.
        unit: name of a unit, in the plural.
        start: units that were done before, in a resumed run.
        quiet: only the last line.
    """

    every = 10.0

    def __init__(self, title: str, total: int, unit: str, start: int = 0, quiet: bool = False) -> None:
        self.title, self.total, self.unit, self.quiet = title, total, unit, quiet
        self.start = self.done = start
        self._begun = self._told = time.monotonic()
        self._last_note = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        mine = self.done - self.start
        if kind is None and mine:
            print(f"{self.title}: {mine:,} {self.unit} in {_clock(time.monotonic() - self._begun)}", file=sys.stderr)

    def update(self, done: int, note: str = "") -> None:
        """Say that `done` units are done in all."""
        self.done, self._last_note = done, note
        self._show()

    def rate(self) -> float:
        """Units a second since the start."""
        elapsed = max(time.monotonic() - self._begun, 1e-9)
        return (self.done - self.start) / elapsed

    def _show(self) -> None:
        now = time.monotonic()
        if self.quiet or now - self._told < self.every or self.done >= self.total:
            return
        self._told = now
        left = (self.total - self.done) / max(self.rate(), 1e-9)
        print(
            f"{self.title}: {self.done:,}/{self.total:,} {self.unit}, {self.rate():.2f}/s, {_clock(left)} left"
            f"{'  ' + self._last_note if self._last_note else ''}",
            file=sys.stderr,
            flush=True,
        )


class _Bar(Progress):
    """A live bar, drawn by rich."""

    def __init__(self, title: str, total: int, unit: str, start: int = 0) -> None:
        super().__init__(title, total, unit, start)
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=RichConsole(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task(title, total=total, completed=start, rate="", note="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        super().__exit__(kind, error, trace)

    def _show(self) -> None:
        self._bar.update(self._task, completed=self.done, rate=f"{self.rate():.2f} {self.unit}/s", note=self._last_note)
