"""What a Jupyter notebook shows while work is going on: one place that changes, not a line each time.

IPython is needed by nobody who is not in a notebook already.
"""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from dpsyngen.console import Console, Progress


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, which can show HTML and pictures."""
    ipython = sys.modules.get("IPython")
    if ipython is None:
        return False
    shell = ipython.get_ipython()
    # A shell in a terminal has no kernel.
    return shell is not None and getattr(shell, "kernel", None) is not None


def console_for(progress: bool) -> Console:
    """Where to tell what is going on: the notebook, or standard error; nowhere if `progress` is false."""
    return NotebookConsole() if progress and in_notebook() else Console(quiet=not progress)


def html_table(rows: Iterable[tuple[str, str]]) -> str:
    """Names and texts as a table of two columns; both are escaped."""
    lines = (
        f'<tr><th scope="row" style="text-align: left; vertical-align: top">{html.escape(name)}</th>'
        f'<td style="text-align: left">{html.escape(text)}</td></tr>'
        for name, text in rows
    )
    return f'<table class="dpsyngen">{"".join(lines)}</table>'


class NotebookConsole(Console):
    """The same as a console, below the cell, in one output that is replaced as things go on."""

    def __init__(self) -> None:
        super().__init__()
        self.live = False
        self._lines: list[str] = []
        self._bar: _NotebookProgress | None = None
        self._handle: Any = None

    def note(self, text: str) -> None:
        """A line about what is going on."""
        self._lines.append(text)
        self.redraw()

    def warn(self, text: str) -> None:
        """Something that was given up, but not the work."""
        self.note(f"warning: {text}")

    def progress(self, title: str, total: int, unit: str, start: int = 0) -> Progress:
        """A bar for `total` units of work, `start` of which were done before."""
        self._bar = _NotebookProgress(self, title, total, unit, start)
        return self._bar

    def bar_ends(self, line: str) -> None:
        """Replace the bar by a line."""
        self._bar = None
        self.note(line)

    def redraw(self) -> None:
        """Show what there is to show."""
        from IPython.display import display

        lines, bars = list(self._lines), ""
        if self._bar is not None:
            bar = self._bar
            lines.append(bar.line())
            bars = f'<progress value="{bar.done}" max="{bar.total}" style="width: 30em"></progress>'
        content = {
            "text/plain": "\n".join(lines),
            "text/html": f'<div class="dpsyngen-progress">{"<br>".join(map(html.escape, lines))}<br>{bars}</div>',
        }
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


class _NotebookProgress(Progress):
    """A bar; it is drawn a few times a second, as each drawing is a message to the browser."""

    every = 0.3

    def __init__(self, console: NotebookConsole, title: str, total: int, unit: str, start: int) -> None:
        super().__init__(title, total, unit, start)
        self._console = console

    def __enter__(self) -> Progress:
        self._console.redraw()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if kind is not None:
            self._console.bar_ends(self.line())

    def line(self, finished: bool = False) -> str:
        """How far it is, in words."""
        text = f"{self.title}: {self.done:,}/{self.total:,} {self.unit}"
        seconds = time.monotonic() - self._begun
        if finished:
            text += f" in {_clock(seconds)}"
        elif self.done > self.start:
            text += f", {_clock((self.total - self.done) / max(self.rate(), 1e-9))} left"
        return f"{text}  {self._last_note}".rstrip()

    def _say(self, left: float) -> None:
        self._console.redraw()

    def _say_end(self, mine: int, seconds: float) -> None:
        self._console.bar_ends(self.line(finished=True))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02} min" if minutes else f"{rest} s"
