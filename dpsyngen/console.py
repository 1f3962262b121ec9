"""What a person or a program sees while the tool works.

Results go to standard output: lines for people, or with ``--json`` exactly one document.  Everything else goes to
standard error: a live bar on a terminal, plain lines elsewhere, or with ``--log-format json`` one JSON object a line.
A notebook has the lines below the cell, and the bar where ipywidgets is installed.
"""

from __future__ import annotations

import html
import io
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, TextIO

from dpsyngen.files import strict_text


def is_open(stream: TextIO | None) -> bool:
    """Whether something can be written: windowed programs and daemons have no standard error or output."""
    return stream is not None and not stream.closed


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person looks at it."""
    return stream is not None and not stream.closed and stream.isatty()


def speak_any_language(as_json: bool) -> None:
    """Have a command escape what the encoding of its output lacks; JSON is UTF-8 wherever it goes (RFC 8259)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.closed:
            json_text = as_json and stream is sys.stdout
            stream.reconfigure(encoding="utf-8" if json_text else None, errors="backslashreplace")


class Console:
    """Lines and progress on standard error, and the result on standard output.

    `quiet` leaves results, warnings and errors; with `as_json` the result is one JSON document.  `log_format` "json" is
    for log collectors, which may carry standard error to another machine: no figure of a private image is in it.
    """

    def __init__(self, quiet: bool = False, as_json: bool = False, log_format: str = "text") -> None:
        self.quiet, self.as_json, self.log_json = quiet, as_json, log_format == "json"
        seen = is_terminal(sys.stderr) or (in_notebook() and find_spec("ipywidgets") is not None)
        self.live = seen and not quiet and not self.log_json
        self._tracked: Progress | None = None

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
            self._result(strict_text(document))
            return
        for text in lines:
            self.line(text)

    def line(self, text: str = "") -> None:
        """A line that belongs to the result, for people."""
        if not self.as_json:
            self._result(text)

    def markdown(self, text: str) -> None:
        """Markdown that belongs to the result, for people: drawn on a terminal, as it is elsewhere."""
        if self.as_json or not is_terminal(sys.stdout):
            self.line(text)
            return
        from rich.console import Console as RichConsole
        from rich.markdown import Markdown

        RichConsole(highlight=False, emoji=False).print(Markdown(text, hyperlinks=False))

    def _result(self, text: str) -> None:
        if is_open(sys.stdout):
            print(text, flush=True)

    def error(self, kind: str, message: str) -> None:
        """Why the command failed: on standard error, and with ``--json`` on standard output, too."""
        self._say(f"dpsyngen: {message}", "error", kind=kind, message=message)
        self.result({"error": {"kind": kind, "message": message}})

    def warn(self, text: str) -> None:
        """Something that was given up, but not the work; said however quiet."""
        self._say(f"dpsyngen: warning: {text}", "warning", message=text)

    def note(self, text: str) -> None:
        """A line about what is going on."""
        if not self.quiet:
            self._say(text, "note", message=text)

    def progress(self, title: str, total: int, unit: str, start: int = 0) -> Progress:
        """Progress of `total` units of work, `start` of which were done before."""
        return (_Bar if self.live else Progress)(self, title, total, unit, start)

    def track(self, title: str, done: int, total: int, unit: str, note: str = "", start: int = 0) -> None:
        """Say that `done` of `total` units are done, `start` of which before; a new title ends the progress before."""
        if self._tracked is None or self._tracked.title != title:
            self.track_ends()
            self._tracked = self.progress(title, total, unit, start).__enter__()
        self._tracked.update(done, note)

    def track_ends(self, error: BaseException | None = None) -> None:
        """End the progress of :meth:`track`, because the work is done or because of `error`."""
        if self._tracked is not None:
            self._tracked.__exit__(type(error) if error is not None else None, error, None)
            self._tracked = None

    def _say(self, text: str, event: str, **values: Any) -> None:
        if self.log_json:
            text = strict_text({"time": round(time.time(), 3), "event": event, **values})
        stream = sys.stdout if in_notebook() else sys.stderr  # which a notebook shows as a warning
        if is_open(stream):  # print() would take None for standard output
            print(text, file=stream, flush=True)


class Progress:
    """Counts units of work, and shows the count every ten seconds and at the end; a context manager."""

    every = 10.0

    def __init__(self, console: Console, title: str, total: int, unit: str, start: int = 0) -> None:
        self.console, self.title, self.total, self.unit = console, title, total, unit
        self.start = self.done = start
        self.note = ""
        self._begun = self._shown = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        mine, seconds = self.done - self.start, time.monotonic() - self._begun
        if kind is None and mine and not self.console.quiet:
            figures = {"title": self.title, "done": mine, "unit": self.unit, "seconds": round(seconds, 3)}
            self.console._say(f"{self.title}: {mine:,} {self.unit} in {_clock(seconds)}", "finished", **figures)

    def update(self, done: int, note: str = "") -> None:
        """Say that `done` units are done in all."""
        self.done, self.note = done, note
        if not self.console.quiet:
            self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._shown < self.every or self.done >= self.total:
            return
        self._shown, rate = now, self.rate()
        left = (self.total - self.done) / max(rate, 1e-9)
        speed = f"{rate:.2f}/s" if rate >= 0.1 else f"{60 * rate:.2f}/min"
        # Before the first unit there is no rate.
        speed = f", {speed}, {_clock(left)} left" if self.done > self.start else ""
        line = f"{self.title}: {self.done:,}/{self.total:,} {self.unit}{speed}  {self.note}".rstrip()
        # The note is left out of JSON, as it may be a figure of private images.
        count = {"title": self.title, "done": self.done, "total": self.total, "unit": self.unit}
        self.console._say(line, "progress", **count, per_second=round(rate, 4), seconds_left=round(left, 1))

    def rate(self) -> float:
        """Units a second since the start."""
        return (self.done - self.start) / max(time.monotonic() - self._begun, 1e-9)


class _Bar(Progress):
    """A live bar, drawn by rich."""

    def __init__(self, console: Console, title: str, total: int, unit: str, start: int = 0) -> None:
        super().__init__(console, title, total, unit, start)
        from rich import progress
        from rich.console import Console as RichConsole

        done, left = (progress.BarColumn(), progress.MofNCompleteColumn()), progress.TimeRemainingColumn()
        columns = ("{task.description}", *done, "{task.fields[rate]}", left, "{task.fields[note]}")
        self._bar = progress.Progress(*columns, console=RichConsole(stderr=True), transient=True)
        self._task = self._bar.add_task(title, total=total, completed=start, rate="", note="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()
        super().__exit__(*error)

    def _show(self) -> None:
        self._bar.update(self._task, completed=self.done, rate=f"{self.rate():.2f} {self.unit}/s", note=self.note)


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


# --------------------------------------------------------------------------------------------- notebooks


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, which can show HTML and pictures."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    # A shell in a terminal has no kernel.
    return getattr(shell, "kernel", None) is not None


def html_table(rows: Iterable[tuple[str, str]]) -> str:
    """Names and texts as a table of two columns; both are escaped."""
    lines = (
        f'<tr><th scope="row" style="text-align: left; vertical-align: top">{html.escape(name)}</th>'
        f'<td style="text-align: left">{html.escape(text)}</td></tr>'
        for name, text in rows
    )
    return f'<table class="dpsyngen">{"".join(lines)}</table>'
