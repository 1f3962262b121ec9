"""The tables of a comparison as text: Markdown for files and documentation, rich for the terminal."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dpsyngen.errors import printable
from dpsyngen.experiments.measures import View, epsilon_name
from dpsyngen.experiments.results import Results
from dpsyngen.experiments.table_values import Cell, Table, all_tables
from dpsyngen.experiments.wording import answers
from dpsyngen.files import write_text

if TYPE_CHECKING:
    from rich.text import Text

    from dpsyngen.console import Console

PRIVATE = "PRIVATE: these figures come from private images.  To publish them costs privacy that no ε here covers."


def write_tables(results: Results, exp: Path) -> Path:
    """Write ``tables.md`` into the folder of an experiment."""
    path = exp / "tables.md"
    write_text(path, markdown(View(results)), 0o600)
    return path


def markdown(view: View) -> str:
    """Answers and all tables."""
    out = [f"**{PRIVATE}**", ""]
    for answer in answers(view):
        out += [f"**{epsilon_name(answer.epsilon)}**: {_escaped(answer.headline)}", ""]
        out += [f"- {_escaped(line)}" for line in answer.lines]
        out += [""] * bool(answer.lines)
    said: set[str] = set()
    for table in all_tables(view):
        out += [f"### {_escaped(table.title)}", "", *markdown_table(table), ""]
        for note in table.notes:
            # Once is enough: most tables are read in the same way.
            out += [_escaped(note), ""] if note not in said else []
            said.add(note)
    if view.results.skipped:
        out += ["Left out:", "", *(f"- {_escaped(name)}: {_escaped(why)}" for name, why in view.results.skipped)]
    return "\n".join(out).rstrip("\n") + "\n"


def markdown_table(table: Table) -> list[str]:
    """Lines of one table; Markdown has no column groups, so the group stands in the name of the column."""
    columns = [f"{group}, {name}" if group else name for group, names in table.groups for name in names]
    align = "---:" if table.numeric else "---"
    lines = [
        _line([*table.heads, *columns]),
        "|" + "|".join(["---"] * len(table.heads) + [align] * len(columns)) + "|",
    ]
    for row in table.rows:
        heads = [f"*{_escaped(h)}*" if row.reference and h else _escaped(h) for h in row.heads]
        lines.append("| " + " | ".join([*heads, *map(_markdown_cell, row.cells)]) + " |")
    return lines


def _line(texts: list[str]) -> str:
    return "| " + " | ".join(_escaped(t) for t in texts) + " |"


def _markdown_cell(cell: Cell) -> str:
    text = _escaped(cell.text + _seeds(cell))
    return f"**{text}**" if cell.mark == "best" else f"{text} †" if cell.mark == "tied" else text


def _seeds(cell: Cell) -> str:
    return "" if cell.n is None else f" (n = {cell.n})"


def _escaped(text: str) -> str:
    """Class names and file names come from users: they must not end a cell or begin markup."""
    return "".join(f"\\{c}" if c in "\\|*_`[]<>#~" else c for c in printable(text, 4000))


def print_tables(exp: Path, console: Console) -> None:
    """Say the answers, accuracies and distances of an experiment; all tables are in tables.md and in the report.

    Raises:
        RunError: not the folder of an experiment.
    """
    results = Results.load(exp)
    view = View(results)
    for answer in answers(view):
        console.line(printable(f"{epsilon_name(answer.epsilon)}: {answer.headline}", 4000))
        for line in answer.lines:
            console.line(printable(f"  {line}", 4000))
    notes: list[str] = []
    for table in all_tables(view):
        if table.key == "accuracy" or table.key.endswith("-lower"):
            console.line()
            console.line(terminal_table(table))
            notes += [note for note in table.notes if note not in notes]
    for note in notes:
        console.line(note)
    for name, why in results.skipped:
        console.line(printable(f"left out: {name}: {why}", 4000))
    console.line(PRIVATE)


def terminal_table(table: Table, width: int | None = None) -> str:
    """One table drawn by rich, without colours where the output is no terminal.

    Args:
        table: to draw.
        width: columns of the terminal; None: as it is, or as wide as the table is where there is none.
    """
    from rich.console import Console as RichConsole
    from rich.table import Table as RichTable
    from rich.text import Text

    terminal = sys.stdout.isatty()
    buffer = io.StringIO()
    # A file has no width: lines must not be cut.
    rich = RichConsole(
        file=buffer, force_terminal=terminal, width=width or (None if terminal else 400), highlight=False, emoji=False
    )
    drawn = RichTable(title=Text(table.title), title_justify="left", title_style="bold")
    for head in table.heads:
        drawn.add_column(Text(head), overflow="fold")
    for group, names in table.groups:
        for name in names:
            title = f"{group}\n{name}" if group else name
            drawn.add_column(Text(title), justify="right" if table.numeric else "left", overflow="fold")
    references = False
    for row in table.rows:
        if row.reference and not references:
            references = True
            drawn.add_section()
        cells = [_rich_cell(c.text + _seeds(c), c.mark) for c in row.cells]
        drawn.add_row(*(Text(printable(h, 80), style="dim" if row.reference else "") for h in row.heads), *cells)
    rich.print(drawn)
    return buffer.getvalue().rstrip("\n")


def _rich_cell(text: str, mark: str) -> Text:
    from rich.text import Text

    # Bold cannot be seen in a file: the star can.
    shown = f"{text} *" if mark == "best" and not sys.stdout.isatty() else f"{text} †" if mark == "tied" else text
    return Text(shown, style="bold" if mark == "best" else "")
