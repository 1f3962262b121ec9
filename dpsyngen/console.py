"""What a person or a program sees while the tool works.

Results go to standard output: lines for people, or with ``--json`` exactly one document.  All else goes to standard
error: a live bar on a terminal, plain lines elsewhere, or with ``--log-format json`` one JSON object a line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from types import TracebackType
from typing import Any

from dpsyngen.files import strict_text

LOG_FORMATS = ("text", "json")


class Console:
    """Lines and progress on standard error, and the result on standard output.

    Args:
        quiet: only results, warnings and errors.
        as_json: the result is one JSON document instead of lines.
        log_format: of what goes to standard error: "text", or "json" for log collectors.  These may carry what they
            get to another machine, so "json" has no figure of a private image in it.
    """

    def __init__(self, quiet: bool = False, as_json: bool = False, log_format: str = "text") -> None:
        self.quiet, self.as_json, self.log_json = quiet, as_json, log_format == "json"
        self.live = sys.stderr.isatty() and not quiet and not self.log_json

    @classmethod
    def asked_for(cls, arguments: Sequence[str]) -> Console:
        """The console for errors of a command line, whether or not the rest of it can be understood."""
        words = list(arguments)
        options = words[: words.index("--")] if "--" in words else words
        log_json = "--log-format=json" in options or ("--log-format", "json") in pairwise(options)
        return cls(as_json="--json" in options, log_format="json" if log_json else "text")

    def result(self, document: Mapping[str, Any], lines: Iterable[str] = ()) -> None:
        """The result of a command, once, as its last act: a document for programs or lines for people."""
        if self.as_json:
            print(strict_text(document), flush=True)
            return
        for text in lines:
            self.line(text)

    def line(self, text: str = "") -> None:
        """A line that belongs to the result, for people."""
        if not self.as_json:
            print(text, flush=True)

    def error(self, kind: str, message: str) -> None:
        """Why the command failed: on standard error, and with ``--json`` on standard output, too."""
        if self.log_json:
            tell("error", kind=kind, message=message)
        else:
            print(f"dpsyngen: {message}", file=sys.stderr, flush=True)
        self.result({"error": {"kind": kind, "message": message}})

    def warn(self, text: str) -> None:
        """Something that was given up, but not the work; said however quiet."""
        if self.log_json:
            tell("warning", message=text)
        else:
            print(f"dpsyngen: warning: {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line about what is going on."""
        if self.quiet:
            return
        if self.log_json:
            tell("note", message=text)
        else:
            print(text, file=sys.stderr, flush=True)

    def progress(self, title: str, total: int, unit: str, start: int = 0) -> Progress:
        """Progress of `total` units of work, `start` of which were done before."""
        if self.live:
            return _Bar(title, total, unit, start)
        kind = _JsonProgress if self.log_json else Progress
        return kind(title, total, unit, start, self.quiet)


def tell(event: str, **values: Any) -> None:
    """One JSON object on a line of standard error."""
    print(strict_text({"time": round(time.time(), 3), "event": event, **values}), file=sys.stderr, flush=True)


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
        quiet: nothing.
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
        if kind is None and mine and not self.quiet:
            self._say_end(mine, time.monotonic() - self._begun)

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
        self._say((self.total - self.done) / max(self.rate(), 1e-9))

    def _say(self, left: float) -> None:
        """One line about how far it is, with `left` seconds to go."""
        rate = self.rate()
        speed = f"{rate:.2f}/s" if rate >= 0.1 else f"{60 * rate:.2f}/min"
        print(
            f"{self.title}: {self.done:,}/{self.total:,} {self.unit}"
            # Nothing can be told from nothing.
            f"{f', {speed}, {_clock(left)} left' if self.done > self.start else ''}"
            f"{'  ' + self._last_note if self._last_note else ''}",
            file=sys.stderr,
            flush=True,
        )

    def _say_end(self, mine: int, seconds: float) -> None:
        """One line at the end, about the `mine` units that were done."""
        print(f"{self.title}: {mine:,} {self.unit} in {_clock(seconds)}", file=sys.stderr)


class _JsonProgress(Progress):
    """The same lines as JSON.  The note is left out, as it may be a figure of private images."""

    def _say(self, left: float) -> None:
        figures = {"done": self.done, "total": self.total, "unit": self.unit, "per_second": round(self.rate(), 4)}
        tell("progress", title=self.title, **figures, seconds_left=round(left, 1))

    def _say_end(self, mine: int, seconds: float) -> None:
        tell("finished", title=self.title, done=mine, unit=self.unit, seconds=round(seconds, 3))


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
