"""The tables of ``dpsyngen stages`` for the terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from dpsyngen.errors import printable
from dpsyngen.thresholds.elbow import METHODS, SIDES, Method, Side
from dpsyngen.thresholds.files import StagesResult
from dpsyngen.thresholds.results import BINS, PROXY, WIENER, Loss, StandInElbows

_SHORT = {"tolerance": "gap", "loss": "loss", "kneedle": "Kneedle"}


def elbow_table(result: StagesResult) -> str:
    """Thresholds of every family against every stand-in, by both methods; the ones that decide are starred."""
    names = {"programs": "other programs", "wiener": "Wiener filter", "proxy": "proxy", "private": "private (DP)"}
    rows = []
    for f in result.found:
        cells = [_threshold(f, side, method) for method in METHODS for side in SIDES]
        rows.append([printable(f.student, 60) + (" *" if f is result.decided else ""), names[f.by], *cells])
    tolerance = f"{100 * result.settings['tolerance']:g} % of the teacher's loss"
    heads = [f"τ_{side}\nby {_SHORT[method]}" for method in METHODS for side in SIDES]
    title = f"Thresholds in log σ [95 %] of a gap, and of an excess of the loss, of {tolerance}; * decides"
    return _drawn(title, ["programs of", "in place of", *heads], rows)


def _threshold(found: StandInElbows, side: Side, method: Method) -> str:
    elbow = found.elbows[side, method]
    if elbow.log_sigma is None:
        return "none"
    interval = "" if elbow.low is None else f" [{elbow.low:.2f}, {elbow.high:.2f}]"
    return f"{elbow.log_sigma:.2f}{interval}"


def loss_table(losses: Sequence[Loss]) -> str:
    """Who denoises the proxy how well, by piece of the axis: loss over that of the zero-information predictor."""
    families = list(dict.fromkeys(loss.family for loss in losses))
    pieces = [name for name, _, _ in BINS if any(loss.log_sigma == name for loss in losses)]
    by = {(loss.family, loss.log_sigma): loss for loss in losses}
    names = {PROXY: "(the proxy itself)", WIENER: "(Wiener filter)"}
    rows = []
    for family in families:
        cells = [by[family, piece] for piece in pieces]
        rows.append(
            [names.get(family, printable(family, 60))]
            + [f"{c.over_zero:.3f} [{c.over_zero_low:.3f}, {c.over_zero_high:.3f}]" for c in cells]
        )
    title = "Loss on the proxy over that of a predictor that knows mean and variance only [95 %], by log σ"
    return _drawn(title, ["trained on", *pieces], rows)


def _drawn(title: str, heads: list[str], rows: list[list[str]]) -> str:
    from rich.console import Console as RichConsole
    from rich.table import Table as RichTable
    from rich.text import Text

    terminal = sys.stdout.isatty()
    buffer = io.StringIO()
    # A file has no width: lines must not be cut.
    rich = RichConsole(
        file=buffer, force_terminal=terminal, width=None if terminal else 400, highlight=False, emoji=False
    )
    table = RichTable(title=Text(title), title_justify="left", title_style="bold")
    for number, head in enumerate(heads):
        table.add_column(Text(head), justify="left" if number < 1 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    rich.print(table)
    return buffer.getvalue().rstrip("\n")
