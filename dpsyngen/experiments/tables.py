"""The answers and tables of a comparison, as values and as Markdown, which rich shows on a terminal.

What a table says is decided in :class:`Table`; the HTML report shows the same values.  Numbers have as many digits as
their spread allows, so that nobody reads a difference out of a last digit, and sentences say no more than was shown.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dpsyngen.console import Console
from dpsyngen.experiments.measures import FIXED, Measure, Row, View, answers, epsilon_name, row_of
from dpsyngen.experiments.statistics import (
    Comparison,
    Summary,
    against_best,
    best_of,
    column_decimals,
    compare,
    decimals_for,
    difference_decimals,
    mean_text,
    number,
    p_text,
    summarise,
)
from dpsyngen.files import write_text
from dpsyngen.privacy.certificate import safe_markdown

PRIVATE = "PRIVATE: these figures come from private images.  To publish them costs privacy that no ε here covers."

REFERENCES = (
    ("test", "real test images (floor)"),
    ("real", "trained on real images"),
    ("dp-classifier", "DP-SGD classifier, same ε"),
    ("programs", "images of programs (ceiling)"),
)
_MOST_CLASSES = 60
_NONE = "–"


class Cell(NamedTuple):
    """One cell: "best" marks the best mean of its column, "tied" those not shown to differ from it; `n` is the number
    of seeds, where it is not the usual one.
    """

    text: str
    mark: Literal["", "best", "tied"] = ""
    n: int | None = None


class TableRow(NamedTuple):
    """One row: texts of the head columns, a cell for each column, and whether it is no row of the grid."""

    heads: tuple[str, ...]
    cells: tuple[Cell, ...]
    reference: bool = False


_EMPTY = Cell(_NONE)


@dataclass(frozen=True)
class Table:
    """A table: `heads` names its head columns, `groups` are (name of the group, names of its columns), the name ""
    where there is one group; references are the last rows; `numeric`: cells are figures.
    """

    key: str
    title: str
    heads: tuple[str, ...]
    groups: tuple[tuple[str, tuple[str, ...]], ...]
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...] = ()
    numeric: bool = True

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(column for _, columns in self.groups for column in columns)


def all_tables(view: View) -> list[Table]:
    """Every table for which there is data, in the order of the report."""
    accuracies = [m for m in view.measures if m.metric == "accuracy"]
    out = [figures_table(view, "accuracy", "Accuracy on real test images (CAS), %, by classifier", accuracies)]
    for on in dict.fromkeys(m.on for m in view.measures if m.metric != "accuracy"):
        for better, what in (("lower", "distances"), ("higher", "fidelity and diversity")):
            these = [m for m in view.measures if m.on == on and m.metric != "accuracy" and m.better == better]
            if these:
                title = f"Features of {these[0].on_name}: {what} ({better} is better)"
                out.append(figures_table(view, f"{on}-{better}", title, these))
    out += [class_table(view), verdict_table(view), compute_table(view)]
    return [table for table in out if table is not None]


def figures_table(view: View, key: str, title: str, measures: Sequence[Measure]) -> Table | None:
    """Rows are variants, a column group is an ε, a column in it a measure; None if there are no measures."""
    if not measures:
        return None
    cells = [_column(view, measure, epsilon) for epsilon in view.epsilons for measure in measures]
    rows = [TableRow(_heads(view, row), tuple(c.get(row.name, _EMPTY) for c in cells)) for row in view.rows]
    for kind, name in REFERENCES:
        if any(kind in c for c in cells):
            heads = (name, "") if view.labels else (name,)
            rows.append(TableRow(heads, tuple(c.get(kind, _EMPTY) for c in cells), reference=True))
    tested = any(cell.mark == "tied" for c in cells for cell in c.values())
    columns = tuple(m.on_name if m.metric == "accuracy" else m.metric_name for m in measures)
    groups = tuple((epsilon_name(e), columns) for e in view.epsilons)
    return Table(key, title, _head_names(view), groups, tuple(rows), tuple(_notes(view, tested)))


def _column(view: View, measure: Measure, epsilon: float) -> dict[str, Cell]:
    """The cells of those rows, by name, and references, by kind, that have values."""
    groups, usual = view.groups(measure, epsilon), max(view.seeds(), default=None)
    summaries, marks = {name: summarise(values) for name, values in groups.items()}, _marks(groups, measure)
    digits = column_decimals(list(summaries.values()), view.half_widths(measure, epsilon))
    out = {
        name: Cell(mean_text(s, digits), marks.get(name, ""), None if s.n == usual else s.n)
        for name, s in summaries.items()
    }
    for kind, _ in REFERENCES:
        if values := view.reference(kind, measure, epsilon):
            s = summarise(values)
            # A floor can be far smaller than the figures above it.
            small = kind == "test" and s.mean
            own = max(digits, min(4, 1 - math.floor(math.log10(abs(s.mean))))) if small else digits
            out[kind] = Cell(mean_text(s, own))
    return out


def _marks(groups: dict[str, list[float]], measure: Measure) -> dict[str, Literal["", "best", "tied"]]:
    """Which rows of a column are best, and which are not shown to differ from the best."""
    if len(groups) < 2:
        return {}
    found = against_best(groups, measure.better)
    none_tested = all(c.verdict == "not tested" for c in found)
    tied = [c.first for c in found if c.verdict in ("not shown", "not tested") and not none_tested]
    out: dict[str, Literal["", "best", "tied"]] = dict.fromkeys(tied, "tied")
    return out | {best_of(groups, measure.better): "best"}


def _notes(view: View, tested: bool) -> list[str]:
    counts = view.seeds()
    if counts == [1]:
        return ["One seed each: bold is the best value of its column, and no difference can be tested."]
    notes = [
        f"Mean ± standard deviation over {max(counts, default=0)} seeds, or n where it is given; the spread is that "
        "of whole runs (noise, starting weights, programs, sampling).  Bold: best mean of its column."
    ]
    if tested:
        notes.append(
            "†: not shown to differ from the best of its column (Welch's t test, Holm's correction over all pairs of "
            "the column, 5 %; stricter than against the baseline, as the best is read off the same figures), or not "
            "tested for want of seeds.  It does not mean that they are equal."
        )
    return notes


def class_table(view: View) -> Table | None:
    """Accuracy on the real test images of each class; rows are classes."""
    measure = view.primary
    if measure is None or measure.metric != "accuracy" or not (names := view.classes(measure.on)):
        return None
    columns = [(e, row) for e in view.epsilons for row in view.rows if view.values(measure, e, row, names[0])]
    by_class = {name: [view.values(measure, e, row, name) for e, row in columns] for name in names}
    of_column = [[values for values in column if values] for column in zip(*by_class.values(), strict=True)]
    digits = [min(column_decimals([summarise(values) for values in column]), 1) for column in of_column]

    def row_of_texts(name: str, columns: Sequence[Sequence[float]], reference: bool = False) -> TableRow:
        pairs = zip(columns, digits, strict=True)
        return TableRow((name,), tuple(Cell(mean_text(summarise(v), d) if v else _NONE) for v, d in pairs), reference)

    notes = ["No tests here: among many classes some differ by chance."]
    if len(names) > _MOST_CLASSES:
        names = sorted(names, key=lambda n: statistics.fmean(v for values in by_class[n] for v in values))
        names = names[:_MOST_CLASSES]
        notes.append(f"The {_MOST_CLASSES} hardest of {len(by_class):,} classes.")
    rows = [row_of_texts(name, by_class[name]) for name in names]
    worst = [[min(of_run) for of_run in zip(*column, strict=False)] for column in of_column]
    rows.append(row_of_texts("worst class of each run", worst, reference=True))
    grouped = ((e, tuple(row.name for at, row in columns if at == e)) for e in view.epsilons)
    groups = tuple((epsilon_name(e), names_at) for e, names_at in grouped if names_at)
    return Table("classes", f"{measure.name} by class, %", ("class",), groups, tuple(rows), tuple(notes))


def verdict_table(view: View) -> Table | None:
    """Every variant against its baseline, by every measure and at every ε."""
    rows = []
    for measure, epsilon in itertools.product(view.measures, view.epsilons):
        baselines, groups = view.baselines(measure, epsilon), view.groups(measure, epsilon)
        for c in compare(list(baselines.items()), groups, measure.better):
            rows.append(_verdict_row(c, measure, (measure.name, c.first, _bare(epsilon))))
    if not rows:
        return None
    columns = ("compared with", "difference", "95 % CI", "p", "p, corrected", "verdict")
    note = (
        "Welch's t test on runs.  The interval and p are those of one comparison alone; the verdict is at 5 % after "
        "Holm's correction within a family: one figure at one ε.  Over many families, expect one false alarm in twenty."
    )
    title, heads = "Every figure against the baseline", ("figure", "variant", "ε")
    return Table("verdicts", title, heads, (("", columns),), tuple(rows), (note,), numeric=False)


def _verdict_row(c: Comparison, measure: Measure, heads: tuple[str, ...]) -> TableRow:
    digits = difference_decimals(c)
    texts = [
        c.second,
        number(c.difference, digits, True) + measure.difference_unit,
        _NONE if c.low is None or c.high is None else f"{number(c.low, digits)} to {number(c.high, digits)}",
        *(_NONE if p is None else p_text(p) for p in (c.p, c.p_corrected)),
    ]
    words = "no difference shown" if c.verdict == "not shown" else c.verdict
    return TableRow(heads, (*map(Cell, texts), Cell(words, "best" if c.verdict in ("better", "worse") else "")))


def compute_table(view: View) -> Table | None:
    """What the runs took."""
    minutes = f"{view.core}min"
    timed = {"public": "public training", "private": "private training"}
    timed |= {name: name for name in ("training", "sampling", "evaluation")}
    columns = [(f"seconds_{name}", f"{title}, {minutes}", 60.0) for name, title in timed.items()]
    columns += [("private_images_seen", "private images used", 1.0), ("parameters", "parameters", 1.0)]
    figures: dict[tuple[Row, float], list[dict[str, Any]]] = {}
    for job in view.runs:
        figures.setdefault((row_of(job), job.epsilon), []).append(job.facts)
    present = [c for c in columns if any(c[0] in facts for group in figures.values() for facts in group)]
    if not present:
        return None
    rows = []
    for (row, epsilon), group in figures.items():
        found = [[facts[name] / unit for facts in group if name in facts] for name, _, unit in present]
        cells = tuple(Cell(_plain(summarise(values)) if values else _NONE) for values in found)
        rows.append(TableRow((*_heads(view, row), _bare(epsilon)), cells))
    groups = (("", tuple(title for _, title, _ in present)),)
    notes = (
        "Mean ± standard deviation over seeds.  Times depend on the machine and on what else it did; on a CPU they are "
        "those of all cores together.  A public network that several runs share counts for each of them.  “private "
        "images used” counts each use.",
    )
    return Table("compute", "Compute", (*_head_names(view), "ε"), groups, tuple(rows), notes)


def _plain(s: Summary) -> str:
    if not s.sd:
        return f"{s.mean:,.0f}" if s.mean >= 100 else f"{s.mean:,.3g}"
    return mean_text(s, max(0, min(2, decimals_for(s.sd))))


def _bare(epsilon: float) -> str:
    return epsilon_name(epsilon).removeprefix("ε = ")


def _heads(view: View, row: Row) -> tuple[str, ...]:
    return (row.variant_name, row.settings_name or _NONE) if view.labels else (row.variant_name,)


def _head_names(view: View) -> tuple[str, ...]:
    return ("variant", "settings") if view.labels else ("variant",)


def write_results(exp: Path) -> list[Path]:
    """Write ``results.csv`` and ``tables.md``; returns their paths."""
    view, paths = View(exp), [exp / "results.csv", exp / "tables.md"]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*FIXED[:8], *view.axes, *FIXED[8:]], lineterminator="\n")
    writer.writeheader()
    writer.writerows(view.tidy())
    write_text(paths[0], text.getvalue(), 0o600)
    write_text(paths[1], markdown(view), 0o600)
    return paths


def markdown(view: View) -> str:
    """Answers and all tables."""
    return "\n".join([f"**{PRIVATE}**", "", *_document(view, all_tables(view))]).rstrip("\n") + "\n"


def print_tables(exp: Path, console: Console) -> None:
    """Say the answers, accuracies and distances of an experiment; all tables are in tables.md and in the report."""
    view = View(exp)
    tables = [t for t in all_tables(view) if t.key == "accuracy" or t.key.endswith("-lower")]
    console.markdown("\n".join([*_document(view, tables), "", PRIVATE]))


def _document(view: View, tables: Sequence[Table]) -> Iterator[str]:
    """Lines of Markdown with the answers, the tables with their notes, and what was left out."""
    for answer in answers(view):
        yield from (safe_markdown(f"{epsilon_name(answer.epsilon)}: {answer.headline}"), "")
        if answer.lines:
            yield from (*(f"- {safe_markdown(line)}" for line in answer.lines), "")
    said: set[str] = set()
    for table in tables:
        yield from (markdown_table(table), "")
        for note in table.notes:
            # Once is enough: most tables are read in the same way.
            if note not in said:
                yield from (safe_markdown(note), "")
                said.add(note)
    if view.skipped:
        yield from ("Left out:", "")
        yield from (f"- {safe_markdown(name)}: {safe_markdown(why)}" for name, why in view.skipped)


def markdown_table(table: Table) -> str:
    """One table under its title; Markdown has no column groups, so the group stands in the name of the column."""
    columns = [f"{group}, {name}" if group else name for group, names in table.groups for name in names]
    align = "---:" if table.numeric else "---"
    lines = [
        [safe_markdown(text) for text in (*table.heads, *columns)],
        ["---"] * len(table.heads) + [align] * len(columns),
    ]
    marks = {"best": "**{}**", "tied": "{} †", "": "{}"}
    for row in table.rows:
        heads = [f"*{safe_markdown(h)}*" if row.reference and h else safe_markdown(h) for h in row.heads]
        texts = (c.text if c.n is None else f"{c.text} (n = {c.n})" for c in row.cells)
        cells = (marks[c.mark].format(safe_markdown(text)) for c, text in zip(row.cells, texts, strict=True))
        lines.append([*heads, *cells])
    return "\n".join([f"### {safe_markdown(table.title)}", "", *(f"| {' | '.join(line)} |" for line in lines)])
